"""A run's directory: results are found again by what they depend on, and by nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.texts import load_text
from quantkit.errors import ConversionError, RecipeError
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import plan
from quantkit.runs.directory import RunDirectory, open_run
from quantkit.runs.rows import RowBuilder
from tests.models import make_checkpoint

SPEC = Spec.parse("gptq:w4g64")


def _calibration(source: Checkpoint, seed: int) -> Calibration:
    text = load_text("pydoc:calibration")
    return calibrate(text, source.tokenizer, samples=4, sequence_length=64, seed=seed)


def _made(
    run: RunDirectory, source: Checkpoint, calibration: Calibration, *, force: bool = False
) -> Variant:
    (make,) = run.variants(source, [plan(source, SPEC)], calibration, force=force)
    return make()


def test_a_variant_is_made_once(tiny_llama: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    calibration = _calibration(source, 0)
    with open_run(tmp_path / "run") as run:
        first = _made(run, source, calibration)
    written = (first.path / "quantkit.json").stat().st_mtime_ns
    with open_run(tmp_path / "run") as run:
        again = _made(run, source, calibration)
    assert again == first
    assert (first.path / "quantkit.json").stat().st_mtime_ns == written


def test_another_calibration_or_source_is_not_taken_for_the_same(
    tiny_llama: Path, tmp_path: Path
) -> None:
    source = Checkpoint.open(tiny_llama)
    other = Checkpoint.open(make_checkpoint(tmp_path / "other", seed=1))
    with open_run(tmp_path / "run") as run:
        first = _made(run, source, _calibration(source, 0))
        with pytest.raises(RecipeError, match=r"made from another calibration; .*--force"):
            _made(run, source, _calibration(source, 1))
        with pytest.raises(RecipeError, match="made from another source"):
            _made(run, other, _calibration(source, 0))
        forced = _made(run, source, _calibration(source, 1), force=True)
    assert forced.manifest is not None
    assert first.manifest is not None
    assert forced.manifest.calibration != first.manifest.calibration


def test_one_pass_makes_what_is_missing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(tiny_llama)
    reads: list[str] = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda c, name: (reads.append(name), read(c, name))[1])

    def make(*entries: Any, force: bool = False) -> list[Variant]:
        plans = [plan(source, Spec.of_entry(entry)) for entry in entries]
        with open_run(tmp_path / "run") as run:
            return [get() for get in run.variants(source, plans, None, force=force)]

    mine = {"spec": "gguf:Q4_0", "name": "mine", "tensor_types": {"ffn_down": "Q8_0"}}
    made = make("gguf:Q8_0", "gguf:Q4_0", mine)
    assert [variant.id for variant in made] == ["gguf-Q8_0", "gguf-Q4_0", "mine"]
    assert len(reads) == len(source.tensors)
    shutil.rmtree(made[1].path)
    assert make("gguf:Q8_0", "gguf:Q4_0", mine)[2] == made[2]
    assert len(reads) == 2 * len(source.tensors)
    other = mine | {"tensor_types": {"ffn_down": "Q5_0"}}
    with pytest.raises(RecipeError, match=r"mine: was made from another tensor_types .*Q8_0.*Q5_0"):
        make("gguf:Q8_0", other)
    with pytest.raises(RecipeError, match=r"mine: was made from another scheme \(Q4_0, not Q5_0\)"):
        make(mine | {"spec": "gguf:Q5_0"})
    assert len(reads) == 2 * len(source.tensors)
    (forced,) = make(other, force=True)
    assert forced.manifest != made[2].manifest


def test_results_are_kept_by_model_and_key(tiny_llama: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    calls: list[int] = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"value": 0.1 * len(calls)}

    with open_run(tmp_path / "run") as run:
        shape = dict[str, float]
        assert run.result("evaluate", source, {"windows": 4}, measure, shape) == {"value": 0.1}
        assert run.result("evaluate", source, {"windows": 4}, measure, shape) == {"value": 0.1}
        assert run.result("evaluate", source, {"windows": 8}, measure, shape) == {"value": 0.2}
        other = Checkpoint.open(make_checkpoint(tmp_path / "other", seed=1))
        assert len(calls) == 2
        run.result("evaluate", other, {"windows": 4}, measure, shape)
        assert len(calls) == 3
        for file in (tmp_path / "run" / "results").iterdir():
            file.write_text(file.read_text()[:5])
        run.result("evaluate", source, {"windows": 4}, measure, shape)
        assert len(calls) == 4


def test_a_failed_measurement_is_not_kept(tiny_llama: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_llama)

    def fail() -> dict[str, float]:
        raise ConversionError("no")

    with open_run(tmp_path / "run") as run:
        for _ in range(2):
            with pytest.raises(ConversionError):
                run.result("bench", source, {}, fail, dict[str, float])


def test_a_directory_that_is_not_a_run_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "thesis.txt").write_text("x")
    with pytest.raises(RecipeError, match=r"exists and is not a quantkit run"), open_run(place):
        pass
    assert [p.name for p in place.iterdir()] == ["thesis.txt"]
    with pytest.raises(RecipeError, match="is a file"), open_run(place / "thesis.txt"):
        pass


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        open_run(tmp_path / "run"),
        pytest.raises(RecipeError, match="another quantkit process"),
        open_run(tmp_path / "run"),
    ):
        pass


def test_what_killed_attempts_left_is_removed_where_it_is_no_longer_wanted(
    tiny_llama: Path, tmp_path: Path
) -> None:
    source = Checkpoint.open(tiny_llama)
    with open_run(tmp_path / "run") as run:
        place = run.path / "variants"
        for name in (".gguf-Q8_0.partial-1-abc", ".gptq-w4g64.partial-0123456789abcdef"):
            (place / name).mkdir(parents=True)
        run.variants(source, [plan(source, Spec("gptq", "w4g64"))], None)
        assert [left.name for left in place.iterdir()] == [".gptq-w4g64.partial-0123456789abcdef"]


def test_a_row_keeps_its_first_failure_and_goes_on() -> None:
    row = RowBuilder.of_variant(SPEC)

    def fail(error: Exception) -> None:
        raise error

    assert row.attempt("convert", lambda: fail(ConversionError("first"))) is None
    assert row.attempt("evaluate", lambda: fail(ValueError("second"))) is None
    assert row.attempt("bench", lambda: 3) == 3
    assert row.failed is not None
    assert (row.failed.stage, row.failed.error) == ("convert", "first")
    with pytest.raises(KeyboardInterrupt):
        row.attempt("bench", lambda: fail(KeyboardInterrupt()))  # type: ignore[arg-type]


def test_the_run_marker_is_json(tmp_path: Path) -> None:
    with open_run(tmp_path / "run"):
        pass
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == {"schema_version": 1}
