"""Whole runs on a tiny model, with the real engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from quantkit import toolchains
from quantkit.errors import ToolchainError
from quantkit.ledger import Ledger
from quantkit.producers.native_gptq import NativeGPTQ
from quantkit.runs import pipeline
from quantkit.runs.recipe import Recipe, load_recipe
from tests.vllm_kernels import needs_integer_kernels

pytestmark = needs_integer_kernels

METRICS = {
    "ppl", "non_finite", "ppl_ratio", "kld_mean", "kld_min", "kld_median", "kld_p90", "kld_p95",
    "kld_p99", "kld_p999", "kld_max", "top1_agreement", "top5_agreement", "delta_p_mean",
    "delta_p_rms", "delta_p_min", "delta_p_p001", "delta_p_p01", "delta_p_p05", "delta_p_median",
    "delta_p_p95", "delta_p_p99", "delta_p_p999", "delta_p_max",
}  # fmt: skip
PROMPTS = {
    "prompts_exact_match", "prompts_text_match", "prompts_kld_mean", "prompts_answer_tokens",
}  # fmt: skip
TEXTS = ["pydoc:evaluation", "stdlib:code"]
SMALL = [
    "calibration.samples=4",
    "calibration.sequence_length=128",
    "evaluate.windows=2",
    "evaluate.context=128",
]


def _command(source: Path, out: Path, *overrides: str) -> list[str]:
    words = [sys.executable, "-m", "quantkit", "run", "quickstart", "--out", str(out)]
    for override in (f"source={source}", *SMALL, *overrides):
        words += ["--set", override]
    return words


def _recipe(source: Path, *overrides: str) -> Recipe:
    return load_recipe("quickstart", [f"source={source}", *SMALL, *overrides])


def test_a_whole_run_fills_every_cell_of_the_ledger(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        toolchains.find("vllm")
    except ToolchainError as error:
        pytest.skip(str(error))
    recipe = _recipe(
        tiny_llama,
        "convert=[gguf:Q4_0, gptq:w4g64, awq:w4g64]",
        "evaluate.answer_tokens=4",
        "bench.seconds=3",
        "bench.repetitions=1",
        "bench.budget_seconds=null",
        "bench.concurrency=[1, 2]",
    )
    ledger = pipeline.run(recipe, tmp_path / "run")
    assert [row.failed for row in ledger.variants] == [None] * 4
    assert [row.id for row in ledger.variants] == [
        "reference", "gguf-Q4_0", "gptq-w4g64", "awq-w4g64",
    ]  # fmt: skip
    for row in ledger.variants:
        assert set(row.metrics) == PROMPTS, row.id
        assert list(row.texts) == TEXTS
        assert all(set(one.metrics) == METRICS for one in row.texts.values()), row.id
        assert [bench.concurrency for bench in row.bench] == [1, 2]
        for bench in row.bench:
            assert (bench.errors, bench.first_error) == (0, None)
            assert bench.requests > 0
            assert bench.output_tokens_per_s > 0
            assert bench.bandwidth is not None
        assert row.sample is not None
        assert row.bytes
    served = [row.bench[0].engine.name for row in ledger.variants]
    assert served == ["vllm", "llamacpp", "vllm", "vllm"]
    reference, gguf, gptq, awq = ledger.variants
    for text in TEXTS:
        own = reference.texts[text].metrics
        assert own["kld_mean"].value == pytest.approx(0, abs=1e-9)
        assert own["top1_agreement"].value == 1
        for row in (gguf, gptq, awq):
            found = row.texts[text]
            assert 0 < found.metrics["kld_mean"].value < 1
            # The same tokens for all.
            for name in METRICS:
                assert found.metrics[name].protocol == own[name].protocol
            assert found.profile is not None
            assert len(found.profile.worst) == 5
    for row in (gguf, gptq, awq):
        for name in PROMPTS:  # the same prompts
            assert row.metrics[name].protocol == reference.metrics[name].protocol
    # Four rows are six pairs; the reference's own divergence is compared with nobody's.
    counts = Counter((pair.measure, pair.text) for pair in ledger.comparisons)
    assert counts == {
        **{("ppl", text): 6 for text in TEXTS},
        **{("kld_mean", text): 3 for text in TEXTS},
    }
    assert Ledger.read(tmp_path / "run" / "ledger.json") == ledger
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(row.id in page for row in ledger.variants)
    assert 'id="reload"' not in page
    # One start of each server, for load and split.
    said = capsys.readouterr().err
    assert said.count(": starting ") == 4
    assert "[1/16] reference: prepare (about " in said
    for row in ledger.variants:
        stages = {"evaluate", "bench"} | ({"convert", "split"} if row.id != "reference" else set())
        assert stages <= set(row.seconds)
        assert row.loss is not None or row.id == "reference"
    assert len(ledger.noise_floor) == 3


def test_a_killed_run_goes_on_where_it_stopped(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = _command(
        tiny_llama, out, "bench=null", "evaluate.prompts=null",
        "convert=[gguf:Q8_0, gptq:w4g64, awq:w4g64]",
    )  # fmt: skip
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    done = out / "variants" / "gguf-Q8_0" / "quantkit.json"
    limit = time.monotonic() + 120
    while not done.is_file() and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (out / "ledger.json").exists()
    # The report is there, of what was found so far; nobody could tell it of the kill.
    assert "The run is still going" in (out / "report.html").read_text()
    kept = done.stat().st_mtime_ns

    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "gguf-Q8_0: made already" in again.stderr
    assert done.stat().st_mtime_ns == kept
    assert len(Ledger.read(out / "ledger.json").variants) == 4
    made = {path.name for path in (out / "variants").iterdir()}
    assert made == {"gguf-Q8_0", "gptq-w4g64", "awq-w4g64"}

    third = subprocess.run(command, capture_output=True, text=True, check=False)
    assert third.stderr.count("evaluate: done already") == 4
    assert third.stderr.count("made already") == 3


def test_a_variant_that_fails_keeps_its_row_and_the_others_go_on(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory left for the Hessian")

    monkeypatch.setattr(NativeGPTQ, "convert", fail)  # a fault that can't be caused otherwise
    recipe = _recipe(
        tiny_llama, "bench=null", "evaluate.prompts=null", "convert=[gptq:w4g64, gguf:Q8_0]"
    )
    ledger = pipeline.run(recipe, tmp_path / "run")
    _, failed, good = ledger.variants
    assert failed.failed is not None
    assert (failed.failed.stage, failed.metrics) == ("convert", {})
    assert "no memory left for the Hessian" in failed.failed.error
    assert good.failed is None
    assert good.texts[TEXTS[0]].metrics["ppl"].value > 0
    assert ledger.failed
    assert [p.name for p in (tmp_path / "run" / "variants").iterdir()] == ["gguf-Q8_0"]
    assert "no memory left" in (tmp_path / "run" / "report.html").read_text()
    monkeypatch.undo()
    again = pipeline.run(recipe, tmp_path / "run")
    assert not again.failed


def test_exit_codes(tiny_llama: Path, tmp_path: Path) -> None:
    """2 before any work, 130 when interrupted, and the next run finds what was done."""
    out = tmp_path / "run"
    words = ("bench=null", "evaluate.prompts=null", "convert=[gguf:Q8_0, awq:w4g64]")
    process = subprocess.Popen(
        _command(tiny_llama, out, *words), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "awq-w4g64: convert" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    _, rest = process.communicate()
    assert process.returncode == 130
    assert "interrupted; run the same command again to continue" in rest
    assert "Traceback" not in rest
    page = (out / "report.html").read_text()
    assert "<strong>The run was interrupted</strong> at <code>awq-w4g64: convert</code>" in page
    assert 'id="reload"' not in page
    ended = subprocess.run(
        [*_command(tiny_llama, out, *words), "--json"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert [row["id"] for row in json.loads(ended.stdout)["variants"]] == [
        "reference", "gguf-Q8_0", "awq-w4g64",
    ]  # fmt: skip
