from __future__ import annotations

import math
from pathlib import Path

import pytest

from quantkit.benchmark.memory_speed import memory_bandwidth
from quantkit.benchmark.results import bandwidth_share, cost, spread, summary
from quantkit.benchmark.weights import Weights, _counted, weights
from quantkit.ledger.load import MemoryBandwidth, Percentiles, Reading
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from tests.models import make_checkpoint

MACHINE = MemoryBandwidth(
    read_bytes_per_s=10e9, copy_bytes_per_s=9e9, triad_bytes_per_s=9e9, threads=2, array_bytes=1
)


def reading(speed: float, ttft: float = 100.0, **more: float) -> Reading:
    times = Percentiles(p50=ttft, p95=2 * ttft, p99=3 * ttft)
    figures = {"seconds": 10.0, "requests": 8, "prompt_tokens": 128.0, "incomplete": 1, **more}
    return Reading(
        output_tokens_per_s=speed, request_per_s=speed / 32, ttft_ms=times, itl_ms=times, **figures
    )


def test_values_are_medians_and_counts_are_sums() -> None:
    found = summary([reading(30.0, 90), reading(20.0, 100), reading(22.0, 200)])
    assert found["output_tokens_per_s"] == 22.0
    assert found["ttft_ms"].model_dump() == {"p50": 100, "p95": 200, "p99": 300}
    assert (found["requests"], found["incomplete"]) == (24, 3)
    assert len(found["repetitions"]) == 3
    assert found["joules_per_token"] is None
    # Standard deviation of 20, 22, 30 is sqrt(28); of their mean, by sqrt(3).
    assert found["throughput_spread"].model_dump() == {
        "low": 20.0, "high": 30.0, "stderr": pytest.approx(math.sqrt(28 / 3)),
    }  # fmt: skip


def test_two_repetitions_have_a_range_and_no_error() -> None:
    assert spread([3.0, 1.0]).model_dump() == {"low": 1.0, "high": 3.0, "stderr": None}


def test_joules_per_token() -> None:
    # 600 J in 10 s at 20 tokens a second: 3 J each.
    assert summary([reading(20.0, joules=600.0)])["joules_per_token"] == pytest.approx(3.0)


def test_cost_by_hand() -> None:
    # 3.60 an hour is 0.001 a second, for 100 tokens: 0.00001 each, 10 a million.
    assert cost(3.6, 100.0) == pytest.approx(10.0)
    assert cost(None, 100.0) is None
    assert cost(3.6, 0.0) is None


def test_bandwidth_share_by_hand() -> None:
    """100 MB of weights at 50 tokens a second are 5 GB/s, half of what the machine reads."""
    alone = bandwidth_share(Weights(100_000_000), MACHINE, 1, 50.0, itl_ms=16.0)
    assert alone.bytes_per_token == 100_000_000
    assert alone.share == pytest.approx(0.5)
    # While it decodes: a step each 16 ms reads 6.25 GB/s.
    assert alone.decode_share == pytest.approx(0.625)
    # Four requests share each step: the same reading gives four times the tokens.
    four = bandwidth_share(Weights(100_000_000), MACHINE, 4, 200.0, itl_ms=20.0)
    assert four.step_bytes == 100_000_000
    assert four.bytes_per_token == 25_000_000
    assert four.share == pytest.approx(0.5)
    assert four.decode_share == pytest.approx(0.5)


def test_a_mixture_reads_the_experts_that_are_chosen() -> None:
    mixture = Weights(10, expert_bytes=80, chosen=2, experts=8)
    assert mixture.step_bytes(1) == 10 + 20
    # Two requests: 1 - (6/8)^2 = 7/16 of the experts on average.
    assert mixture.step_bytes(2) == 10 + 35
    assert mixture.step_bytes(1000) == 90


def test_an_embedding_is_read_only_as_an_output_layer() -> None:
    layers = {"model.layers.0.mlp.up_proj.weight": 100, "model.norm.weight": 1}
    embedding = {"model.embed_tokens.weight": 50}
    assert _counted({**layers, **embedding}, 0, 0) == Weights(151)  # tied
    apart = {**layers, **embedding, "lm_head.weight": 60}
    assert _counted(apart, 0, 0) == Weights(161)
    assert _counted({**apart, "transformer.wpe.weight": 9}, 0, 0) == Weights(161)
    experts = {"model.layers.0.mlp.experts.3.up_proj.weight": 400}
    assert _counted({**apart, **experts}, 8, 2) == Weights(161, 400, 2, 8)
    assert _counted({**apart, **experts}, 0, 0) is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_each_format(tied: bool, tmp_path: Path) -> None:
    """All tensors of the tiny model, but an embedding that is not the output layer as well."""
    source = Checkpoint.open(make_checkpoint(tmp_path / "model", tie_word_embeddings=tied))
    rows = 0 if tied else source.tensors["model.embed_tokens.weight"].numel
    read = weights(source)
    assert read == Weights(2 * (source.parameters - rows))
    variant = convert(source, Spec("gguf", "F16"), None, tmp_path / "out")
    in_gguf = weights(variant)
    assert in_gguf is not None
    # Norms are float32 there, everything else 16 bits.
    assert 0 <= in_gguf.shared_bytes - read.shared_bytes < 0.01 * read.shared_bytes


def test_bandwidth_is_measured_over_all_threads() -> None:
    found = memory_bandwidth(array_bytes=1 << 22, passes=2)
    assert found.array_bytes == 1 << 22
    assert min(found.read_bytes_per_s, found.copy_bytes_per_s, found.triad_bytes_per_s) > 1e7
