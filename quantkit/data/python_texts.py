"""Texts that Python brings: its language manual, and the code of its standard library."""

from __future__ import annotations

import ast
import platform
import pydoc_data.topics
from functools import cache
from itertools import chain, islice, zip_longest
from typing import TYPE_CHECKING

from quantkit.data.standard_library import stdlib_modules
from quantkit.data.text import Text, paragraphs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_CODE = 1_000_000
"""Characters of code to calibrate on: many times what a quantizer looks at."""
_EVALUATED_MODULES = 64
"""How many modules' functions are to be evaluated on: some 120 windows of 512 tokens."""


def pydoc(part: str) -> Text:
    """Python's own language manual, topic by topic; each paragraph is in one part only.

    Every fourth topic is for calibration. Topics repeat one another's paragraphs: those that were
    seen in calibration are left out of the evaluation text.
    """
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    calibration = "\n".join(topics[::4])
    if part == "calibration":
        text = calibration
    else:
        text = without(calibration, "\n".join(text for i, text in enumerate(topics) if i % 4))
    return Text(f"pydoc:{part}", f"python {platform.python_version()}", text)


def evaluated() -> tuple[Text, Text]:
    """Those of them that are to be evaluated on."""
    return pydoc("evaluation"), stdlib("code")


def stdlib(part: str) -> Text:
    """Python source code; each module, and each paragraph, is in one part only.

    To evaluate on, the first function of each module comes first, then the second of each: a few
    windows see many kinds of code. Calibration has none of the manual's paragraphs either that are
    to be evaluated on.
    """

    text = without(pydoc("evaluation").text, _calibration_code()[:_CODE])
    if part != "calibration":
        modules = islice(stdlib_modules(calibration=False).values(), _EVALUATED_MODULES)
        in_turns = chain.from_iterable(zip_longest(*map(_functions, modules)))
        text = without(text, "\n\n\n".join(code for code in in_turns if code))
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


def without(seen: str, text: str) -> str:
    """``text`` without the paragraphs of ``seen``."""
    known = paragraphs(seen)
    return "\n".join(line for line in text.splitlines() if line.strip() not in known)
