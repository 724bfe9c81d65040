"""Every error that quantkit raises on purpose.

A message says what, where, what was expected and what to do, in one line:
``gptq: group_size 96 does not divide in_features 2048 (model.layers.0.mlp.up_proj); use 32 or 64``.
The CLI prints that line and exits with the error's ``exit_code``; ``--debug`` adds the traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class QuantkitError(Exception):
    """Base of all errors that a user can cause or mend."""

    exit_code = 2


class RecipeError(QuantkitError):
    """A recipe, a spec or an option asks for something that does not exist or does not fit."""


class CheckpointError(QuantkitError):
    """The source checkpoint is missing something, is damaged, or is unsafe to open."""


class ConversionError(QuantkitError):
    """A checkpoint cannot be written in the format and scheme that was asked for."""


class IncompatibleVariant(QuantkitError):
    """This engine cannot load this model."""


class ToolchainError(QuantkitError):
    """An engine or a producer is not installed, or its installation failed."""


class EngineError(QuantkitError):
    """An engine was started and did not do what it should."""


class EvaluationError(QuantkitError):
    """A measurement could not be made, or two results cannot be compared."""


def first_line(error: BaseException) -> str:
    """Another package's error in one line: its first line, or the one that this announces."""
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if first.endswith(":") and more:
        _, is_error, what = more[0].partition("Error: ")
        return what if is_error else f"{first} {more[0]}"
    return first or type(error).__name__


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn whatever another package raises over a file of a checkpoint, or what follows from its
    values, into a CheckpointError that names the file and the reason."""
    try:
        yield
    except QuantkitError:
        raise
    except Exception as error:
        # What others say on purpose is a sentence; what Python says needs its name.
        told = isinstance(error, ValueError | OSError) or type(error).__module__ != "builtins"
        kind = "" if told else f"{type(error).__name__}: "
        raise CheckpointError(f"{path}: {kind}{first_line(error)}") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'Q4_K_M'?"``, or nothing when no known word is near."""
    names = list(known)
    by_folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return f"; did you mean {by_folded[near[0]]!r}?" if near else ""
