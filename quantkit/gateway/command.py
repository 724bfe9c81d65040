"""``quantkit serve``: from what the command line says to a gateway that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.engines import serving_engine
from quantkit.errors import RecipeError
from quantkit.formats.detect import open_model
from quantkit.gateway.access_log import say
from quantkit.gateway.address import base_url, curl_example, is_loopback
from quantkit.gateway.config import GatewayConfig, load_config, of_command_line
from quantkit.ledger import Ledger, Row
from quantkit.models.engine_config import EngineConfig, Option, by_engine
from quantkit.recommendation import Candidate, by_default
from quantkit.recommendation.nearness import divergence

BEST, FAST, RECOMMENDED = "best", "fast", "recommended"
"""Other names of the variants of a run: nearest to the reference, most tokens a second, and what
``quantkit recommend`` says without any limit of its own."""


@dataclass(frozen=True)
class ServeCommand:
    """What the command line says; None, False or empty where it says nothing."""

    paths: Sequence[str] = ()
    config: Path | None = None
    from_run: Path | None = None
    aliases: Sequence[str] = ()
    host: str | None = None
    port: int | None = None
    api_key: str | None = None
    memory_budget: str | None = None
    idle_timeout: float | None = None
    preload: bool = False
    engine: str | None = None
    """``NAME``, or ``NAME:OPTION=VALUE,…``."""
    context: int | None = None
    slots: int | None = None
    engine_options: Mapping[str, Option] = field(default_factory=dict)
    """``{"vllm.tensor_parallel_size": 2}``; where a single engine runs, without its name."""


def run(command: ServeCommand) -> int:
    """Serve until Ctrl-C; returns the exit code. Raise QuantkitError for what is no good."""
    config = gateway_config(command)
    key = command.api_key or config.key()
    if key is None and not is_loopback(config.host):
        raise RecipeError(
            f"host {config.host}: anyone who reaches it could use the models; give --api-key, or "
            f"set {config.api_key_env}"
        )
    from quantkit.gateway import gateway

    return gateway.run(config, key, lambda: _say_ready(config, key))


def gateway_config(command: ServeCommand) -> GatewayConfig:
    """What the gateway is to do; raise RecipeError where that is not said, or twice."""
    overrides: dict[str, Any] = {
        "host": command.host,
        "port": command.port,
        "memory_budget": command.memory_budget,
        "idle_timeout_seconds": command.idle_timeout,
    }
    if command.config is not None:
        of_engines = (
            command.paths, command.from_run, command.aliases, command.preload, command.engine,
            command.context, command.slots, command.engine_options,
        )  # fmt: skip
        if any(of_engines):
            raise RecipeError(
                "--config says what is served: give with it only --host, --port, --api-key, "
                "--memory-budget and --idle-timeout"
            )
        return load_config(command.config, overrides)
    paths = _by_id(command.paths)
    aliases: dict[str, str] = {}
    engines: dict[str, EngineConfig] = {}
    if command.from_run is not None:
        ledger = Ledger.of_run(command.from_run)
        pick = recommended(ledger)
        # As they were measured: of several engines, the first.
        engines = {row.id: row.bench[0].engine.having({}) for row in ledger.variants if row.bench}
        paths |= _of_run(command.from_run, ledger, pick)
        aliases = {name: row.id for name, row in best_and_fast(ledger).items()}
        if pick:
            aliases[RECOMMENDED] = pick.row.id
            engines[pick.row.id] = pick.config.having({})
    if not paths:
        raise RecipeError("nothing to serve: give a PATH, --from-run DIR or --config FILE")
    given = {"context": command.context, "slots": command.slots}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    # One alone is what the gateway is there for: it is loaded before anybody asks.
    preload = command.preload or len(paths) == 1
    settings["preload"] = preload
    if command.engine is not None:
        engines = dict.fromkeys(paths, EngineConfig.parse(command.engine))
    if command.engine_options:
        engines = {name: engines.get(name) or _usual(path) for name, path in paths.items()}
        running = [config.name for config in engines.values()]
        own = by_engine(command.engine_options, running)
        engines = {name: config.having(own[config.name]) for name, config in engines.items()}
    backends = {
        name: {"path": path, "engine": engines.get(name), **settings}
        for name, path in paths.items()
    }
    return of_command_line(backends, command.aliases, aliases, overrides)


def _usual(path: str) -> EngineConfig:
    return EngineConfig(name=serving_engine(open_model(path)).name)


def recommended(ledger: Ledger) -> Candidate | None:
    """What ``quantkit recommend`` picks; None where nothing was benched or nothing fits."""
    found = by_default(ledger)
    return found.pick.candidate if found and found.pick else None


def best_and_fast(ledger: Ledger) -> dict[str, Row]:
    """``best``: the variant nearest to the reference; ``fast``: that with the most tokens a second
    at the highest concurrency; as far as they were measured."""
    rows = [row for row in ledger.variants[1:] if row.failed is None]
    near = [(drift.value, row) for row in rows if (drift := divergence(row))]
    levels = [bench.concurrency for row in rows for bench in row.bench]
    speeds = {
        row.id: max(b.output_tokens_per_s for b in row.bench if b.concurrency == max(levels))
        for row in rows
        if any(b.concurrency == max(levels) for b in row.bench)
    }
    found = {}
    if near:
        found[BEST] = min(near, key=lambda pair: pair[0])[1]
    if speeds:
        found[FAST] = max((row for row in rows if row.id in speeds), key=lambda r: speeds[r.id])
    return found


def _of_run(directory: Path, ledger: Ledger, pick: Candidate | None) -> dict[str, str]:
    """Paths by id; the reference's own where it is the pick."""
    made = [row for row in ledger.variants[1:] if row.failed is None]
    if not made:
        raise RecipeError(f"{directory}: no variant of this run is whole")
    paths = {row.id: str(directory / row.path) for row in made}
    return paths if pick is None else paths | {pick.row.id: str(directory / pick.row.path)}


def _by_id(paths: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for path in paths:
        name = open_model(path).id
        if name in named:
            raise RecipeError(
                f"{named[name]} and {path} are both called {name}; name them in a --config file"
            )
        named[name] = path
    return named


def _say_ready(config: GatewayConfig, key: str | None) -> None:
    url = base_url(config.host, config.port)
    names = [*config.models, *(f"{alias} ({name})" for alias, name in config.aliases.items())]
    say(f"models: {', '.join(names)}; Ctrl-C stops")
    say(f"ready: {url}\n\n{curl_example(url, next(iter(config.models)), keyed=key is not None)}\n")
