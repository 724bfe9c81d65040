"""The load as the command line gives it, as a recipe's section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from quantkit.benchmark.section import BenchSection
from quantkit.errors import RecipeError
from quantkit.models.engine_config import EngineConfig
from quantkit.system.yaml_file import said


def section(
    *, concurrency: str, rates: str | None, slo: str | None, engines: Sequence[str], **given: Any
) -> BenchSection:
    """What was typed: ``1,4`` or ``auto``, ``0.5,2``, ``ttft_ms=500,itl_ms=50``; all else as it is,
    None where not given. Raise RecipeError for what makes no sense."""
    found = {key: value for key, value in given.items() if value is not None}
    found["engines"] = [EngineConfig.parse(engine) for engine in engines]
    found["concurrency"] = "auto" if concurrency == "auto" else _words(concurrency)
    if rates:
        found["rates"] = _words(rates)
    if slo:
        found["slo"] = dict(pair.partition("=")[::2] for pair in slo.split(","))
    try:
        return BenchSection.model_validate(found)
    except ValidationError as error:
        problem = error.errors()[0]
        option = "--" + str(problem["loc"][0]).replace("_", "-") if problem["loc"] else "bench"
        option = {"--rates": "--rate", "--engines": "--engine"}.get(option, option)
        where = ".".join(map(str, problem["loc"][1:]))
        raise RecipeError(f"{option} {where}".rstrip() + f": {said(problem)}") from error


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
