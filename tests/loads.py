"""Made-up loads with repetitions of their own, and a whole sweep over two engines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median, stdev
from typing import Any

from quantkit.ledger import Row
from quantkit.ledger.load import (
    Bandwidth,
    Bench,
    Goodput,
    Percentiles,
    RateReading,
    Reading,
    Slo,
    Spread,
)
from quantkit.models.engine_config import EngineConfig
from tests import ledger_rows
from tests.ledger_rows import LLAMACPP, VLLM

LEVELS = (1, 2, 4, 8, 16, 32)
SLO = Slo(ttft_ms=500, itl_ms=50)
_OUTPUT = 64


def bench(
    engine: EngineConfig,
    concurrency: int,
    rates: Sequence[float],
    *,
    ttft_p95: float = 100.0,
    itl_p95: float = 20.0,
    memory: int = 400_000_000,
    **more: Any,
) -> Bench:
    """A closed loop whose repetitions had these throughputs; their median is its figure."""
    readings = [
        Reading(
            seconds=20.0,
            output_tokens_per_s=rate,
            request_per_s=rate / _OUTPUT,
            ttft_ms=Percentiles(p50=ttft_p95 * 0.6, p95=ttft_p95, p99=ttft_p95 * 1.2),
            itl_ms=Percentiles(p50=itl_p95 * 0.7, p95=itl_p95, p99=itl_p95 * 1.3),
            requests=8 * concurrency,
            prompt_tokens=128.0,
            client_cpu=0.1,
        )
        for rate in rates
    ]
    given: dict[str, Any] = {
        "startup_seconds": 41.0 if engine == VLLM else 1.4,
        "load_seconds": 9.0 if engine == VLLM else 0.4,
        "protocol": {
            "load_generator": "guidellm 0.8.1", "prompt_tokens": 128, "output_tokens": _OUTPUT,
            "seconds": 20, "repetitions": len(rates), "server": ["--threads", "2"],
        },
        **more,
    }  # fmt: skip
    return Bench(
        engine=engine,
        concurrency=concurrency,
        output_tokens_per_s=median(rates),
        request_per_s=median(rates) / _OUTPUT,
        ttft_ms=readings[0].ttft_ms,
        itl_ms=readings[0].itl_ms,
        throughput_spread=_spread(rates),
        ttft_spread=_spread([one.ttft_ms.p50 for one in readings]),
        itl_spread=_spread([one.itl_ms.p50 for one in readings]),
        requests=8 * concurrency * len(readings),
        errors=0,
        peak_rss_bytes=memory,
        repetitions=readings,
        **given,
    )


def _spread(values: Sequence[float]) -> Spread:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 2 else None
    return Spread(low=min(values), high=max(values), stderr=error)


def faster(one: Bench, times: float) -> Bench:
    """The same load with a higher throughput in each repetition."""
    readings = [
        reading.model_copy(update={"output_tokens_per_s": reading.output_tokens_per_s * times})
        for reading in one.repetitions
    ]
    changed = {"output_tokens_per_s": one.output_tokens_per_s * times, "repetitions": readings}
    return one.model_copy(update=changed)


def goodput(engine: EngineConfig, rate: float, above: float | None, slo: Slo = SLO) -> Goodput:
    """A search that ended between ``rate`` and ``above``."""
    tokens = rate * _OUTPUT
    return Goodput(
        engine=engine,
        slo=slo,
        arrivals="poisson",
        rate_per_s=rate,
        attained=0.97 if rate else None,
        output_tokens_per_s=tokens,
        above_per_s=above,
        readings=[
            RateReading(rate_per_s=rate, requests=60, attained=0.97, output_tokens_per_s=tokens)
        ],
        ended="the next step is within a tenth",
        cost_per_million_tokens=0.4 / tokens / 3600 * 1e6 if rate else None,
        protocol={"slo": slo.model_dump()},
    )


def swept() -> list[Row]:
    """Reference and six variants on two engines, as a GPU-less server would measure them: llama.cpp
    is the faster for one request and levels off soon, vLLM goes on."""
    return [
        _on(ledger_rows.reference(), (VLLM, 27.9, 14.0, 2_310_000_000)),
        _on(
            ledger_rows.row(
                "gguf-F16", "gguf:F16", size=270_898_000, bits=(16.0, 16.0), seconds=2.0,
                ppl=(21.4313, 0.3127), kld=(0.00003, 0.000001, 0.9981), correct=84, speed=(1, 1),
            ),
            (LLAMACPP, 33.5, 3.4, 641_000_000),
        ),
        _on(
            ledger_rows.row(
                "gguf-Q8_0", "gguf:Q8_0", size=144_811_072, bits=(8.52, 8.5), seconds=4.1,
                ppl=(21.4402, 0.3129), kld=(0.00094, 0.00002, 0.9868), correct=84, speed=(1, 1),
            ),
            (LLAMACPP, 58.3, 3.1, 512_000_000), (VLLM, 22.4, 9.0, 2_190_000_000),
        ),
        _on(
            ledger_rows.row(
                "gguf-Q4_K_M", "gguf:Q4_K_M", size=105_454_432, bits=(6.21, 5.68), seconds=6.9,
                ppl=(21.9817, 0.3214), kld=(0.0241, 0.0004, 0.9322), correct=81, speed=(1, 1),
            ),
            (LLAMACPP, 66.1, 3.0, 472_000_000),
        ),
        _on(
            ledger_rows.row(
                "gguf-Q4_0", "gguf:Q4_0", size=91_727_904, bits=(5.39, 4.5), seconds=4.4,
                ppl=(24.1034, 0.3591), kld=(0.1187, 0.0018, 0.8571), correct=79, speed=(1, 1),
            ),
            (LLAMACPP, 71.0, 3.2, 458_000_000),
        ),
        _on(
            ledger_rows.row(
                "gptq-w4g64", "gptq:w4g64", size=113_246_208, bits=(6.72, 4.31), seconds=171.0,
                ppl=(22.1745, 0.3252), kld=(0.0388, 0.0006, 0.9147), correct=86, speed=(1, 1),
            ),
            (VLLM, 39.2, 11.0, 2_150_000_000),
        ),
        _on(
            ledger_rows.row(
                "awq-w4g64", "awq:w4g64", size=113_508_352, bits=(6.73, 4.31), seconds=148.0,
                ppl=(22.2086, 0.3261), kld=(0.0395, 0.0006, 0.9139), correct=82, speed=(1, 1),
            ),
            (VLLM, 38.6, 10.8, 2_150_000_000),
        ),
    ]  # fmt: skip


def _on(row: Row, *engines: tuple[str, float, float, int]) -> Row:
    """The row under a sweep: engine, tokens/s of one request, the most times as much that many
    bring, memory."""
    benches, goodputs = [], []
    for engine, first, most, memory in engines:
        for level in LEVELS:
            rate = first * most * level / (most - 1 + level)
            itl = 1000 * level / rate
            benches.append(
                bench(
                    engine, level, [rate * factor for factor in (0.992, 1.0, 1.011)],
                    ttft_p95=(40 if engine == LLAMACPP else 70) * (1 + level / most),
                    itl_p95=itl * 1.2, memory=memory,
                    cost_per_million_tokens=0.4 / rate / 3600 * 1e6,
                    joules_per_token=45.0 / rate,
                    client_bound=(engine, level) == (VLLM, 32) and first < 25,
                    bandwidth=Bandwidth(
                        step_bytes=row.bytes or 1, bytes_per_token=(row.bytes or 1) / level,
                        share=(row.bytes or 1) / level * rate / 2.1e10,
                        decode_share=min(0.95, (row.bytes or 1) / (itl / 1000) / 2.1e10),
                    ),
                )
            )  # fmt: skip
        met = [
            one.request_per_s
            for one in benches
            if one.engine == engine and SLO.met_by(one.ttft_ms.p95, one.itl_ms.p95)
        ]
        best = max(met, default=0.0)
        goodputs.append(goodput(engine, round(best * 0.8, 2), round(best * 0.88, 2) or 0.2))
    return row.model_copy(update={"bench": benches, "goodput": goodputs})
