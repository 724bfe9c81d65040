"""YAML files that a person writes: read, and told where they are wrong, by line and key."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from quantkit.errors import RecipeError, did_you_mean


class Section(BaseModel):
    """Keys of such a file that belong together; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def given(cls, asked: Self | Mapping[str, Any] | None = None, **keys: Any) -> Self:
        """The section itself, or one of these keys and values.

        Raise RecipeError for the first that is unknown or has no such value.
        """
        if isinstance(asked, cls) and not keys:
            return asked
        values = asked.model_dump() if isinstance(asked, cls) else dict(asked or {})
        try:
            return cls.model_validate({**values, **keys})
        except ValidationError as error:
            problem = _foremost(error)
            where = ".".join(map(str, problem["loc"]))
            known = (
                did_you_mean(where, list(cls.model_fields)) if "extra" in problem["type"] else ""
            )
            raise RecipeError(f"{where}: {said(problem)}{known}") from error


def said(problem: ErrorDetails) -> str:
    """What pydantic found, or what a validator of ours says of it."""
    return str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]


@contextmanager
def as_value_error() -> Iterator[None]:
    """A RecipeError of the block as pydantic takes it from a validator."""
    try:
        yield
    except RecipeError as error:
        raise ValueError(str(error)) from error


def read_yaml(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a file and its keys and values; raise RecipeError where it has none."""
    text = path.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected keys and values, found {type(content).__name__}")
    return text, content


def first_problem(
    model: type[BaseModel], path: Path, text: str, error: ValidationError
) -> RecipeError:
    """The first thing that is wrong with a file which should be a ``model``: line, key, what."""
    problem = _foremost(error)
    where = problem["loc"]
    key = ".".join(str(part) for part in where)
    line = line_of(text, where)
    place = f"{path}:{line}" if line else str(path)
    subject = f"{place}: {key}" if key else place
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, where[:-1])
        hint = did_you_mean(str(where[-1]), known)
        return RecipeError(f"{place}: unknown key {key!r}; keys here are {', '.join(known)}{hint}")
    if problem["type"] == "missing":
        return RecipeError(f"{place}: {key!r} is missing")
    if problem["type"] == "value_error":
        return RecipeError(f"{subject}: {said(problem)}")
    given = json.dumps(problem["input"], default=str)
    return RecipeError(f"{subject}: {problem['msg']}, not {given}")


def _foremost(error: ValidationError) -> ErrorDetails:
    """A key that is misspelt is also one that is missing: the first says more."""
    problems = error.errors()
    return next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])


def line_of(text: str, where: Sequence[int | str]) -> int | None:
    """The line of the key at ``where``, or of the nearest section above it; None at the top."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    line = None
    for part in where:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _fields_at(model: type[BaseModel], where: Sequence[int | str]) -> list[str]:
    """The keys that the section at ``where`` knows."""
    found: Any = model
    for part in where:
        if isinstance(found, type) and issubclass(found, BaseModel):
            found = _section(found.model_fields[str(part)].annotation)
        else:  # the entries of a mapping or a list
            found = _section(get_args(found)[-1])
    return list(found.model_fields)


def _section(annotation: Any) -> Any:
    """A section, or a mapping or list of some, without what else may stand in its place."""
    if get_origin(annotation) is Annotated:
        return _section(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return next(_section(one) for one in get_args(annotation) if one is not types.NoneType)
    return annotation
