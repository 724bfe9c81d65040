"""Text to calibrate on and to evaluate on, by name or from a file."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import pydoc_data.topics
import sysconfig
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_MIN_PARAGRAPH = 64
"""Characters below which a paragraph says nothing about where it came from (headings, 'x = 1')."""

_CODE = 1_000_000
"""Characters of code to calibrate on: many times what a quantizer looks at."""
_EVALUATED_MODULES = 64
"""How many modules' functions are to be evaluated on: some 120 windows of 512 tokens."""
_NOT_CODE = frozenset({
    "site-packages", "dist-packages", "test", "tests", "ensurepip",
    "encodings", "pydoc_data",  # tables, and the text of pydoc:evaluation
    "distutils", "idlelib", "lib2to3", "tkinter", "turtledemo",  # not installed everywhere
})  # fmt: skip
"""Directories of Python's standard library whose modules are left out."""


Conversation = tuple[dict[str, str], ...]
"""Messages, each with ``role`` and ``content``."""


class MissingText(RecipeError):
    """A text whose source is not installed."""


@dataclass(frozen=True)
class Text:
    """A text and where it came from; ``revision`` is what pins it: a version or a hash."""

    dataset: str
    revision: str | None
    text: str
    conversations: tuple[Conversation, ...] = ()
    """What the text is made of, where that is conversations; ``text`` is then what is said."""


def load_text(name: str, others: Iterable[str] = ()) -> Text:
    """Load ``pydoc:calibration``, ``wikitext-2:test``, … or a UTF-8 file by its path.

    A file that ends in ``.jsonl`` holds conversations: a JSON object with ``messages`` a line.
    ``others``: what else the caller knows by name, to say where ``name`` is nothing known. Raise
    RecipeError where there is neither such a name nor such a file.
    """
    if name in NAMED:
        return NAMED[name]()
    path = Path(name).expanduser()
    if not path.is_file():
        known = [*others, *NAMED]
        raise RecipeError(
            f"text {name!r}: no such file, and not one of {', '.join(known)}"
            + did_you_mean(name, known)
        )
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"text {path}: not UTF-8 (byte {error.start}); convert it") from error
    found = Text(path.name, "sha256:" + hashlib.sha256(data).hexdigest(), text)
    if path.suffix != ".jsonl":
        return found
    chats = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            chats.append(_conversation_in(line, f"text {path}:{number}"))
    return of_conversations(found, chats)


def load_texts(names: Sequence[str]) -> dict[str, Text]:
    """Load each, by its name or its file's.

    Raise RecipeError where two have one name, and what ``load_text`` raises.
    """
    found: dict[str, Text] = {}
    for given in names:
        name = given if given in NAMED else Path(given).name
        if name in found:
            raise RecipeError(f"texts: {name} is there twice; leave one out, or rename the file")
        found[name] = load_text(given)
    return found


def said(conversation: Conversation) -> str:
    """What a conversation says, without who says it."""
    return "\n\n".join(message["content"] for message in conversation)


def of_conversations(text: Text, conversations: Iterable[Conversation]) -> Text:
    """``text`` as one that is made of these."""
    chats = tuple(conversations)
    return replace(text, text="\n\n".join(map(said, chats)), conversations=chats)


def conversation_of(messages: Iterable[Mapping[str, Any]], where: str) -> Conversation:
    """Roles and contents of the messages; raise RecipeError where one is not a text."""
    try:
        found = tuple({key: message[key] for key in ("role", "content")} for message in messages)
        if not found or not all(isinstance(text, str) for one in found for text in one.values()):
            raise TypeError
    except (KeyError, TypeError) as error:
        raise RecipeError(
            f'{where}: expected {{"messages": [{{"role": "user", "content": "…"}}, …]}}'
        ) from error
    return found


def _conversation_in(line: str, where: str) -> Conversation:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise RecipeError(f"{where}: not JSON: {error}") from error
    messages = content.get("messages") if isinstance(content, dict) else None
    return conversation_of(messages or (), where)


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
    names = _standard_library()
    digests = {name: hashlib.sha256(name.encode()).digest() for name in names}
    return {
        name: names[name]
        for name in sorted(names, key=digests.__getitem__)
        if (digests[name][0] % 4 == 0) == calibration
    }


@cache
def _standard_library() -> dict[str, Path]:
    """The modules by their path in it, without those of ``_NOT_CODE``."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for place, directories, files in os.walk(root):
        directories[:] = [name for name in directories if name not in _NOT_CODE]
        for path in (Path(place, name) for name in files):
            # _sysconfigdata…: a table of this machine.
            if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
                found[path.relative_to(root).as_posix()] = path
    return found


def _stdlib(part: str) -> Text:
    """Python source code; each module, and each paragraph, is in one part only.

    To evaluate on, the first function of each module comes first, then the second of each: a few
    windows see many kinds of code. Calibration has none of the manual's paragraphs either that are
    to be evaluated on.
    """

    text = _without(_pydoc("evaluation").text, _calibration_code()[:_CODE])
    if part != "calibration":
        modules = islice(stdlib_modules(calibration=False).values(), _EVALUATED_MODULES)
        in_turns = chain.from_iterable(zip_longest(*map(_functions, modules)))
        text = _without(text, "\n\n\n".join(code for code in in_turns if code))
    return Text(f"stdlib:{part}", f"python {platform.python_version()}", text)


@cache
def _calibration_code() -> str:
    modules = stdlib_modules(calibration=True).values()
    return "\n".join(path.read_text(encoding="utf-8") for path in modules)


def _functions(path: Path) -> Iterator[str]:
    """The functions of a module as they are written, comments and all."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            yield "\n".join(lines[node.lineno - 1 : node.end_lineno])


def _without(seen: str, text: str) -> str:
    """``text`` without the paragraphs of ``seen``."""
    known = paragraphs(seen)
    return "\n".join(line for line in text.splitlines() if line.strip() not in known)


def _installed(kind: str) -> Text:
    from quantkit import installed_texts

    load: Callable[[], Text] = getattr(installed_texts, kind)
    return load()


def _hub(kind: str) -> Text:
    from quantkit import hub_texts

    return hub_texts.calibration(kind)


def _wikitext_2(split: str) -> Text:
    from quantkit import hub_texts

    return hub_texts.wikitext_2(split)


EVALUATED = ("pydoc:evaluation", "stdlib:code")
"""The texts to evaluate on that come from what is installed."""
_HUB = ("web", "code", "chat", "math", "languages", "encyclopedia")

NAMED: dict[str, Callable[[], Text]] = {
    "pydoc:calibration": lambda: _pydoc("calibration"),
    "pydoc:evaluation": lambda: _pydoc("evaluation"),
    "stdlib:calibration": lambda: _stdlib("calibration"),
    "stdlib:code": lambda: _stdlib("code"),
    "packages:prose": lambda: _installed("prose"),
    "packages:web": lambda: _installed("web"),
    "packages:chat": lambda: _installed("chats"),
    "packages:math": lambda: _installed("mathematics"),
    "packages:languages": lambda: _installed("languages"),
    "wikitext-2:train": lambda: _wikitext_2("train"),
    "wikitext-2:test": lambda: _wikitext_2("test"),
    **{f"hub:{kind}": partial(_hub, kind) for kind in _HUB},
}
