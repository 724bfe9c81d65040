"""Text to calibrate on and to evaluate on, by name or from a file."""

from __future__ import annotations

import hashlib
import platform
import pydoc_data.topics
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

_MIN_PARAGRAPH = 64
"""Characters below which a paragraph says nothing about where it came from (headings, 'x = 1')."""

_NOT_CODE = frozenset({
    "site-packages", "dist-packages", "test", "tests", "ensurepip",
    "encodings", "pydoc_data",  # tables, and the text of pydoc:evaluation
    "distutils", "idlelib", "lib2to3", "tkinter", "turtledemo",  # not installed everywhere
})  # fmt: skip
"""Directories of Python's standard library whose modules are left out."""


@dataclass(frozen=True)
class Text:
    """A text and where it came from; ``revision`` is what pins it: a version or a hash."""

    dataset: str
    revision: str | None
    text: str


def load_text(name: str) -> Text:
    """Load ``pydoc:calibration``, ``wikitext-2:test``, … or a UTF-8 file by its path.

    Raise RecipeError where there is neither such a name nor such a file.
    """
    if name in NAMED:
        return NAMED[name]()
    path = Path(name).expanduser()
    if not path.is_file():
        raise RecipeError(
            f"text {name!r}: no such file, and not one of {', '.join(NAMED)}"
            + did_you_mean(name, NAMED)
        )
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"text {path}: not UTF-8 (byte {error.start}); convert it") from error
    return Text(path.name, "sha256:" + hashlib.sha256(data).hexdigest(), text)


def paragraphs(text: str) -> set[str]:
    """The lines long enough to be recognized again, without the space around them."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= _MIN_PARAGRAPH}


def check_disjoint(calibration: Text, evaluation: Text) -> None:
    """Raise RecipeError where a paragraph to be evaluated on was calibrated on."""
    shared = paragraphs(calibration.text) & paragraphs(evaluation.text)
    if shared:
        raise RecipeError(
            f"calibration text {calibration.dataset!r} holds {len(shared)} paragraphs of the "
            f"evaluation text {evaluation.dataset!r} (such as {min(shared)[:60]!r}); "
            "drift would be flattered: choose another text for one of them"
        )


def _pydoc(part: str) -> Text:
    """Python's own language manual, topic by topic; each paragraph is in one part only.

    Every fourth topic is for calibration. Topics repeat one another's paragraphs: those that were
    seen in calibration are left out of the evaluation text.
    """
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    calibration = "\n".join(topics[::4])
    if part == "calibration":
        text = calibration
    else:
        text = _without(calibration, "\n".join(text for i, text in enumerate(topics) if i % 4))
    return Text(f"pydoc:{part}", f"python {platform.python_version()}", text)


def stdlib_modules(*, calibration: bool) -> dict[str, Path]:
    """The modules of Python's standard library that are for calibration, or the others.

    By their path in the library (``json/decoder.py``), in the order of its sha256, which also
    decides: one in four is for calibration, whatever else is installed.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if _NOT_CODE.isdisjoint(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")  # a table of this machine
    }
    digests = {name: hashlib.sha256(name.encode()).digest() for name in names}
    return {
        name: names[name]
        for name in sorted(names, key=digests.__getitem__)
        if (digests[name][0] % 4 == 0) == calibration
    }


def _stdlib(part: str) -> Text:
    """Python source code; each module, and each paragraph, is in one part only."""

    def code(*, calibration: bool) -> str:
        modules = stdlib_modules(calibration=calibration).values()
        return "\n".join(path.read_text(encoding="utf-8") for path in modules)

    text = code(calibration=True)
    if part != "calibration":
        text = _without(text, code(calibration=False))
    return Text(f"stdlib:{part}", f"python {platform.python_version()}", text)


def _without(seen: str, text: str) -> str:
    """``text`` without the paragraphs of ``seen``."""
    known = paragraphs(seen)
    return "\n".join(line for line in text.splitlines() if line.strip() not in known)


def _wikitext_2(split: str) -> Text:
    """WikiText-2 raw from the hub, put together again as the original file."""
    from datasets import load_dataset

    name = "Salesforce/wikitext"
    try:
        rows = load_dataset(name, "wikitext-2-raw-v1", split=split)
    except Exception as error:  # network, hub and cache: datasets has no common class for them
        raise RecipeError(
            f"text 'wikitext-2:{split}': the hub said: {str(error).splitlines()[0]}; give the "
            "path of a local wiki.test.raw instead"
        ) from error
    # The hub's rows are the file's lines, its blank lines (" \n") as empty strings.
    text = "".join(row or " \n" for row in rows["text"])
    return Text(f"{name} wikitext-2-raw-v1 {split}", str(rows.version), text)


NAMED: dict[str, Callable[[], Text]] = {
    "pydoc:calibration": lambda: _pydoc("calibration"),
    "pydoc:evaluation": lambda: _pydoc("evaluation"),
    "stdlib:calibration": lambda: _stdlib("calibration"),
    "stdlib:code": lambda: _stdlib("code"),
    "wikitext-2:train": lambda: _wikitext_2("train"),
    "wikitext-2:test": lambda: _wikitext_2("test"),
}
