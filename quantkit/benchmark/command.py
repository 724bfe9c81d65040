"""``quantkit bench``: the command line as a recipe's section, and models one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from quantkit.benchmark import bench, engines_of, on_each
from quantkit.benchmark.generator import Client
from quantkit.benchmark.measured import BenchResult
from quantkit.benchmark.memory_speed import memory_bandwidth
from quantkit.benchmark.options import BenchOptions, workload
from quantkit.benchmark.section import BenchSection
from quantkit.benchmark.server import Servers
from quantkit.errors import RecipeError
from quantkit.evaluation.prompt_file import load_prompts
from quantkit.models.variant import Model
from quantkit.system import extras
from quantkit.system.home import home
from quantkit.system.machine import gpu
from quantkit.system.progress import say


def section(
    *, concurrency: str, rates: str | None, slo: str | None, engines: Sequence[str], **given: Any
) -> BenchSection:
    """What was typed: ``1,4`` or ``auto``, ``0.5,2``, ``ttft_ms=500,itl_ms=50``; all else as it is,
    None where not given. Raise RecipeError for what makes no sense."""
    found = {key: value for key, value in given.items() if value is not None}
    found["engines"] = list(engines)
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
        said = problem["ctx"]["error"] if problem["type"] == "value_error" else problem["msg"]
        where = ".".join(map(str, problem["loc"][1:]))
        raise RecipeError(f"{option} {where}".rstrip() + f": {said}") from error


def run(models: Mapping[str, Model], asked: BenchSection) -> dict[str, BenchResult]:
    """Put each model under the same loads, on each engine that was asked for and takes it.

    What an error leaves of a model is in its result, with the error, and the next one goes on.
    """
    extras.require("bench")
    engines = {name: engines_of(asked.engines, model) for name, model in models.items()}
    options = {}
    for name, model in models.items():
        for engine in engines[name]:
            engine.check(model)
        prompts = load_prompts(asked.prompts, asked.lengths[1], model)
        options[name] = BenchOptions.of_section(asked, workload(asked, model, prompts))
    bandwidth = None if gpu() else memory_bandwidth()
    work = home() / "logs" / "bench"
    results = {}
    work.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(prefix="guidellm-", dir=work) as files,  # several may run
        Client(Path(files)) as client,
    ):
        for name, model in models.items():
            with Servers(model, options[name], work, client) as servers:
                measure = partial(bench, servers, bandwidth=bandwidth)
                results[name] = on_each(engines[name], measure)
    for name, result in results.items():
        if sample := result.sample:
            say(f"{name}: {sample.prompt!r} → {sample.completion!r}")
    return results


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
