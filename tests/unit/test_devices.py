"""Where quantizers run, what they keep between blocks, and where the time goes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.texts import load_text
from quantkit.decoder import blocks
from quantkit.decoder.activations import Activations
from quantkit.errors import RecipeError
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from quantkit.quantize.gptq import _inverse_factor
from quantkit.system import devices
from quantkit.system.stopwatch import OTHER, Stopwatch, stage

CPU = torch.device("cpu")


def test_auto_is_the_gpu_where_there_is_one() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert devices.choose("auto").type == expected
    assert devices.choose("cpu") == CPU


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpu", "expected auto, cpu, cuda or cuda:N"),
        ("mps", "run on cpu and cuda"),
        ("cuda:99", "CUDA device.* use --device cpu"),
    ],
)
def test_a_device_that_is_not_there_is_named(name: str, says: str) -> None:
    with pytest.raises(RecipeError, match=f"device '{name}'.*{says}"):
        devices.choose(name)


@pytest.mark.parametrize("limit", [1 << 20, 100])
def test_activations_are_kept_in_memory_or_in_a_file(limit: int, tmp_path: Path) -> None:
    values = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    store = Activations((5, 3, 4), batch=2, device=CPU, limit=limit)
    for index, part in enumerate(torch.split(values, 2)):
        store.replace(index, part)
    assert [len(batch) for batch in store] == [2, 2, 1]
    for index, batch in enumerate(store):
        store.replace(index, batch + 1)
    assert torch.equal(torch.cat(list(store)), values + 1)


def test_stages_add_up_and_an_inner_one_stops_the_outer() -> None:
    with stage("unwatched"):
        pass
    started = time.perf_counter()
    with Stopwatch(CPU) as watch:
        with stage("outer"):
            time.sleep(0.02)
            with stage("inner"):
                time.sleep(0.04)
        time.sleep(0.01)
    took = time.perf_counter() - started
    assert set(watch.seconds) == {OTHER, "outer", "inner"}
    assert watch.seconds["inner"] >= 0.04
    assert watch.seconds["outer"] >= 0.02
    assert sum(watch.seconds.values()) <= took
    assert watch.seconds["outer"] + watch.seconds["inner"] <= took - watch.seconds[OTHER]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_is_that_of_the_inverse(dtype: torch.dtype) -> None:
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hessian = x.T @ x
    factor, damping = _inverse_factor(hessian.flip(0, 1).to(dtype), 0.01)
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(
        (factor.T @ factor).double(), torch.linalg.inv(hessian), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("spec", ["gptq:w4g64", "awq:w4g64"])
def test_in_float64_integers_do_not_depend_on_the_order_of_sums(
    spec: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other devices add in another order; so do other batches."""
    source = Checkpoint.open(tiny_llama)
    text = load_text("pydoc:calibration")
    windows: Calibration = calibrate(
        text, source.tokenizer, samples=8, sequence_length=64, seed=0, precision="float64"
    )
    made = []
    for name, ids, batch in (("one", windows.ids, 512), ("two", windows.ids.flip(0), 128)):
        monkeypatch.setattr(blocks, "_BATCH_TOKENS", batch)
        variant = convert(source, Spec.parse(spec), replace(windows, ids=ids), tmp_path / name)
        made.append(Checkpoint.open(variant.path))
        assert variant.manifest is not None
        assert variant.manifest.convert.device == "cpu"
        assert {"load", "forward", "hessian", "solve"} <= set(
            variant.manifest.convert.stage_seconds
        )
    for name in made[0].tensors:
        if name.endswith("qweight"):
            assert torch.equal(made[0].read(name), made[1].read(name)), name


@pytest.mark.parametrize(
    ("narrow", "chosen"), [(0.5, torch.bfloat16), (0.9, torch.float32), (70.0, torch.float32)]
)
def test_the_precision_is_what_this_cpu_is_faster_in(
    monkeypatch: pytest.MonkeyPatch, narrow: float, chosen: torch.dtype
) -> None:
    seconds = {torch.bfloat16: narrow, torch.float32: 1.0}
    monkeypatch.setattr(devices, "_seconds", seconds.__getitem__)
    devices._fastest_on_cpu.cache_clear()
    try:
        assert devices.precision("auto", torch.device("cpu")) == chosen
        assert devices.precision("bfloat16", torch.device("cpu")) == torch.bfloat16
        assert devices.precision("auto", torch.device("cuda")) == torch.bfloat16
    finally:
        devices._fastest_on_cpu.cache_clear()
