"""Recipes: YAML files that say what a run makes and measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
)

from quantkit.benchmark.section import BenchSection
from quantkit.data.section import CalibrationSection
from quantkit.errors import RecipeError, did_you_mean
from quantkit.evaluation.section import EvaluateSection
from quantkit.models.spec import Spec
from quantkit.runs.external import ExternalVariant
from quantkit.runs.source import AdaptedSource, parsed
from quantkit.system.packaged import packaged_files
from quantkit.system.yaml_file import Section, as_value_error, first_problem, read_yaml


def _variant(entry: Any) -> Spec | ExternalVariant:
    """What an entry of ``convert`` says: what to make, or what somebody else made."""
    if isinstance(entry, dict) and "path" in entry:
        return ExternalVariant.of_entry(entry)
    return Spec.of_entry(entry)


def _entry(entry: Any) -> Any:
    with as_value_error():
        _variant(entry)
    return entry


class Recipe(Section):
    """One run. ``evaluate`` or ``bench`` null leaves it out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, and of its directory under runs/."""
    description: str = ""
    """What the run is for, shown in its report."""
    source: Annotated[str | AdaptedSource, BeforeValidator(parsed)]
    """A directory, a hub id such as ``org/name@revision``, or ``demo:smollm2-135m``; or a LoRA
    adapter and its base, merged: ``{base: org/name, adapter: ./my-lora}``."""
    calibration: CalibrationSection = CalibrationSection()
    """The text that GPTQ, AWQ and importance matrices are fitted to."""
    convert: list[Annotated[str | dict[str, Any], BeforeValidator(_entry)]]
    """The variants: ``gguf:Q4_K_M``, or ``spec: gguf:Q4_K_M`` with a ``name`` and the format's
    options, or ``path: ./theirs``, made by somebody else and measured beside the others."""
    allow_tokenizer_differences: bool = False
    """Accept GGUF files with which llama.cpp splits some texts into other tokens than the source's
    tokenizer; their notes say which."""
    evaluate: EvaluateSection | None = EvaluateSection()
    """What is measured of every variant; null: nothing."""
    bench: BenchSection | None = BenchSection()
    """The load that every variant is put under; null: none."""

    @property
    def variants(self) -> list[Spec | ExternalVariant]:
        """The entries of ``convert``, parsed."""
        return [_variant(entry) for entry in self.convert]

    @property
    def specs(self) -> list[Spec]:
        """Those of them that are to be made."""
        return [entry for entry in self.variants if isinstance(entry, Spec)]


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by the name of a shipped one or by its path, with ``key=value`` overrides.

    Keys are dotted (``evaluate.windows=8``), values YAML. Raise RecipeError with the
    file, the line and the key of the first thing that is wrong.
    """
    path = find_recipe(name)
    text, content = read_yaml(path)
    for override in overrides:
        _override(content, override)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise first_problem(Recipe, path, text, error) from error
    names = [entry.directory for entry in recipe.variants]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(
                f"{path}: convert has {name} more than once; give each its own `name`"
            )
    return recipe


def find_recipe(name: str) -> Path:
    """A path as given, or a recipe that quantkit ships, by its name."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"recipe {path}: no such file")
        return path
    shipped = {file.stem: file for file in packaged_files("recipes")}
    if name not in shipped:
        raise RecipeError(
            f"recipe {name!r}: no such file, and not a shipped recipe ({', '.join(shipped)})"
            + did_you_mean(name, shipped)
        )
    return shipped[name]


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r}: expected key=value, such as bench.seconds=30")
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content = content[section]
    try:
        content[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML") from error
