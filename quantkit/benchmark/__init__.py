"""What a serving engine delivers: start the real server, ask it something, put it under load.

The order is that of a fair comparison: every load once, then every load once more, and so on, so
that what slows the machine down for a while falls on all loads alike. Each repetition is kept as
soon as it is made, and an error loses nothing that was measured before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantkit.benchmark.energy import meter
from quantkit.benchmark.generator import LoadGenerator
from quantkit.benchmark.measured import BenchResult, Incomplete, together
from quantkit.benchmark.results import Facts, results
from quantkit.benchmark.server import Servers
from quantkit.benchmark.session import Keep, Session
from quantkit.engines import load_engine, serving_engine
from quantkit.engines.base import ServingEngine, serving
from quantkit.errors import EngineError
from quantkit.formats import format_of
from quantkit.ledger.load import MemoryBandwidth
from quantkit.models.engine_config import EngineConfig
from quantkit.models.variant import Model


def engines_of(asked: Sequence[EngineConfig], model: Model) -> list[ServingEngine]:
    """The given engines that serve the model's format; the usual engine where none of them does."""
    named = [load_engine(config) for config in asked]
    able = [one for one in named if model.format in one.capabilities.formats]
    serves = [serving(engine, model) for engine in able if engine.capabilities.serves]
    return serves or [serving_engine(model)]


def on_each(
    engines: Sequence[ServingEngine], measure: Callable[[ServingEngine], BenchResult]
) -> BenchResult:
    """The results of all engines together: an engine that fails leaves an error and what was
    measured before, and the next one goes on."""
    found = []
    for engine in engines:
        try:
            found.append(measure(engine))
        except Incomplete as stopped:
            found.append(stopped.result)
        except EngineError as error:
            found.append(BenchResult(error=str(error)))
    return together(found)


def bench(
    servers: Servers,
    engine: ServingEngine,
    bandwidth: MemoryBandwidth | None = None,
    keep: Keep | None = None,
) -> BenchResult:
    """Measure the model of ``servers`` on ``engine``.

    ``bandwidth``: the machine's, if the engine computes there. Before anything is started, raise
    ToolchainError, IncompatibleVariant, or RecipeError where a request is longer than the model's
    context; later EngineError where nothing could be measured, Incomplete where not all could.
    """
    model, options = servers.model, servers.options
    engine.check(model)
    options.workload.check(format_of(model).context_length(model))
    servers.client.start()  # both take their time
    server = servers.on(engine)
    servers.client.wait_ready()
    with meter() as energy:
        generator = LoadGenerator(
            servers.client,
            server.target(model),
            options.workload,
            slo=options.slo,
            meter=energy,
            check=server.check,
        )
        session = Session(generator, server.process, options, server.key, keep)
        session.measure_all()
    facts = Facts(
        engine=server.engine,
        startup_seconds=server.startup_seconds,
        load_seconds=server.load_seconds,
        peak_rss_bytes=server.memory.peak_bytes,
        protocol=server.protocol,
    )
    benches, rates, goodputs = results(
        model, facts, options, bandwidth, session.readings, session.found, session.cut
    )
    result = BenchResult(benches, rates, goodputs, server.sample, session.error)
    if session.error is None:
        return result
    if not session.readings:
        raise EngineError(session.error)
    raise Incomplete(result)
