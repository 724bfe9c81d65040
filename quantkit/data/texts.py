"""Text to calibrate on and to evaluate on, by name or from a file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.data.python_texts import pydoc, stdlib
from quantkit.data.text import Text, paragraphs
from quantkit.data.text_file import read_text_file
from quantkit.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


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
    return read_text_file(path)


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


def check_disjoint(calibration: Text, evaluation: Text) -> None:
    """Raise RecipeError where a paragraph to be evaluated on was calibrated on."""
    shared = paragraphs(calibration.text) & paragraphs(evaluation.text)
    if shared:
        raise RecipeError(
            f"calibration text {calibration.dataset!r} holds {len(shared)} paragraphs of the "
            f"evaluation text {evaluation.dataset!r} (such as {min(shared)[:60]!r}); "
            "drift would look too small: choose another text for one of them"
        )


def _installed(kind: str) -> Text:
    from quantkit.data import installed_texts

    load: Callable[[], Text] = getattr(installed_texts, kind)
    return load()


def _hub(kind: str) -> Text:
    from quantkit.data import hub_texts

    return hub_texts.calibration(kind)


def _wikitext_2(split: str) -> Text:
    from quantkit.data import hub_texts

    return hub_texts.wikitext_2(split)


_HUB = ("web", "code", "chat", "math", "languages", "encyclopedia")

NAMED: dict[str, Callable[[], Text]] = {
    "pydoc:calibration": lambda: pydoc("calibration"),
    "pydoc:evaluation": lambda: pydoc("evaluation"),
    "stdlib:calibration": lambda: stdlib("calibration"),
    "stdlib:code": lambda: stdlib("code"),
    "packages:prose": lambda: _installed("prose"),
    "packages:web": lambda: _installed("web"),
    "packages:chat": lambda: _installed("chats"),
    "packages:math": lambda: _installed("mathematics"),
    "packages:languages": lambda: _installed("languages"),
    "wikitext-2:train": lambda: _wikitext_2("train"),
    "wikitext-2:test": lambda: _wikitext_2("test"),
    **{f"hub:{kind}": partial(_hub, kind) for kind in _HUB},
}
