"""Rows of made-up ledgers, of the size that real runs give."""

from __future__ import annotations

from typing import Any

from quantkit.ledger import Metric, OnText, Row, Sample
from quantkit.ledger.load import Bench, Percentiles, Reading, Spread
from quantkit.models.engine_config import EngineConfig
from quantkit.models.variant import ConvertCost
from tests import answers, drifts
from tests.engine_configs import config

DOCS, CODE = "pydoc:evaluation", "stdlib:code"
TRANSFORMERS, LLAMACPP, VLLM = map(
    config, ("transformers 5.19.0", "llamacpp 0.3.36", "vllm 0.32.0")
)

_WINDOWS = {
    "context": 512,
    "stride": 512,
    "bos": 1,
    "windows": 80,
    "scored_positions": "256..510 of each window",
    "text": "pydoc:evaluation",
    "text_sha256": "cd" * 32,
    "metrics_version": 2,
}
_TOKENS = 20_400
_TASK = {
    "harness": "lm-eval 0.4.13",
    "task": "mmlu, 57 subjects",
    "shots": 0,
    "score": "loglikelihood of the letter",
    "metrics_version": 2,
}
_QUESTIONS = 282


def metric(
    value: float,
    stderr: float | None,
    engine: EngineConfig = TRANSFORMERS,
    *,
    n: int = _TOKENS,
    reference: str | None = None,
    protocol: dict[str, Any] | None = None,
) -> Metric:
    return Metric(
        value=value,
        stderr=stderr,
        n=n,
        reference=reference,
        protocol=_WINDOWS if protocol is None else protocol,
        engine=engine,
    )


def with_metrics(row: Row, text: str = DOCS, **metrics: Metric) -> Row:
    """The row with these metrics of a text in place of its own."""
    one = row.texts[text]
    changed = one.model_copy(update={"metrics": one.metrics | metrics})
    return row.model_copy(update={"texts": row.texts | {text: changed}})


def accuracy(correct: int, engine: EngineConfig) -> Metric:
    share = correct / _QUESTIONS
    error = (share * (1 - share) / (_QUESTIONS - 1)) ** 0.5
    return metric(share, error, engine, n=_QUESTIONS, protocol=_TASK)


def drift(engine: EngineConfig, kld: float, stderr: float, agreement: float) -> dict[str, Metric]:
    """The divergence metrics of one variant; the tail in the ratio that real ones have."""
    error = (agreement * (1 - agreement) / _TOKENS) ** 0.5
    values = {
        "kld_mean": (kld, stderr),
        "kld_median": (kld * 0.45, None),
        "kld_p99": (kld * 9.5, None),
        "kld_max": (kld * 70, None),
        "top1_agreement": (agreement, error),
        "top5_agreement": (1 - 1.3 * (1 - agreement), error),
        "delta_p_rms": (0.3 * kld**0.5, stderr),
    }
    return {
        name: metric(value, error, engine, reference="reference")
        for name, (value, error) in values.items()
    }


_NOISE = (0.98, 1.0, 1.03)
"""By how much repetitions of a load differ."""


def bench(engine: EngineConfig, concurrency: int, tokens_per_s: float, ttft_ms: float) -> Bench:
    itl = 1000 * concurrency / tokens_per_s
    readings = [
        Reading(
            seconds=20.0,
            output_tokens_per_s=tokens_per_s * factor,
            request_per_s=tokens_per_s * factor / 64,
            ttft_ms=Percentiles(p50=ttft_ms, p95=ttft_ms * 1.6, p99=ttft_ms * 1.9),
            itl_ms=Percentiles(p50=itl * 0.9, p95=itl * 1.3, p99=itl * 1.7),
            requests=8 * concurrency,
            prompt_tokens=128.0,
            client_cpu=0.08,
        )
        for factor in _NOISE
    ]
    return Bench(
        engine=engine,
        concurrency=concurrency,
        output_tokens_per_s=tokens_per_s,
        request_per_s=tokens_per_s / 64,
        ttft_ms=readings[1].ttft_ms,
        itl_ms=readings[1].itl_ms,
        throughput_spread=Spread(
            low=tokens_per_s * _NOISE[0],
            high=tokens_per_s * _NOISE[-1],
            stderr=tokens_per_s * 0.0145,
        ),
        ttft_spread=Spread(low=ttft_ms, high=ttft_ms, stderr=0.0),
        itl_spread=Spread(low=itl * 0.9, high=itl * 0.9, stderr=0.0),
        requests=8 * concurrency * len(readings),
        errors=0,
        client_cpu=0.08,
        startup_seconds=41.0 if engine == VLLM else 1.4,
        peak_rss_bytes=2_310_000_000 if engine == VLLM else 412_000_000,
        repetitions=readings,
        protocol={
            "load_generator": "guidellm 0.8.1",
            "prompt_tokens": 128,
            "output_tokens": 64,
            "seconds": 20,
            "repetitions": 3,
            "server": ["--threads", "2"],
        },
    )


def row(
    id_: str,
    spec: str,
    *,
    size: int,
    bits: tuple[float, float | None],
    seconds: float,
    ppl: tuple[float, float],
    kld: tuple[float, float, float],
    correct: int,
    speed: tuple[float, float],
    notes: tuple[str, ...] = (),
) -> Row:
    gguf = spec.startswith("gguf")
    scores, serves = (LLAMACPP, LLAMACPP) if gguf else (TRANSFORMERS, VLLM)
    return Row(
        id=id_,
        spec=spec,
        path=f"variants/{id_}",
        bytes=size,
        bits_per_weight=bits[0],
        bits_per_weight_quantized=bits[1],
        convert=ConvertCost(seconds=seconds, peak_rss_bytes=1_350_000_000),
        notes=list(notes),
        texts={
            DOCS: OnText(
                metrics={"ppl": metric(*ppl, scores), **drift(scores, *kld)},
                profile=drifts.profile(kld[0]),
            )
        },
        metrics={
            "mmlu_acc": accuracy(correct, scores),
            "prompts_kld_mean": metric(
                kld[0] * 0.8,
                kld[0] * 0.12,
                scores,
                n=answers.PROMPTS,
                reference="reference",
                protocol=answers.PROTOCOL,
            ),
        },
        prompts=answers.drift(kld[0]),
        bench=[
            bench(serves, 1, speed[0], 55.0 if gguf else 88.0),
            bench(serves, 4, speed[1], 161.0 if gguf else 203.0),
        ],
        sample=Sample(
            prompt="The capital of France is",
            completion=" Paris. The city is located in the north of the country, on the Seine.",
        ),
    )


def reference() -> Row:
    return Row(
        id="reference",
        spec="safetensors:bf16",
        path="/home/user/.cache/quantkit/demo/v1/SmolLM2-135M",
        bytes=269_060_552,
        bits_per_weight=16.0,
        texts={
            DOCS: OnText(
                metrics={
                    "ppl": metric(21.4312, 0.3127, TRANSFORMERS),
                    **drift(TRANSFORMERS, 0.0, 0.0, 1.0),
                }
            )
        },
        metrics={"mmlu_acc": accuracy(84, TRANSFORMERS)},
        bench=[bench(VLLM, 1, 27.9, 131.0), bench(VLLM, 4, 74.6, 322.0)],
        sample=Sample(
            prompt="The capital of France is",
            completion=" Paris. It is the largest city in France and the seat of government.",
        ),
    )
