from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from quantkit.cli.main import cli
from quantkit.engines.transformers import TransformersScorer
from quantkit.errors import EvaluationError
from quantkit.evaluation import reference as module
from quantkit.evaluation.hidden_states import pack, unpack
from quantkit.evaluation.perplexity import Windows, windows
from quantkit.evaluation.reference import Reference
from quantkit.models.checkpoint import Checkpoint
from tests.models import VOCABULARY, make_checkpoint


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Checkpoint:
    return Checkpoint.open(tiny_llama)


@pytest.fixture(scope="module")
def cut() -> Windows:
    ids = torch.randint(VOCABULARY, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    return windows(ids, context=64)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reference(source: Checkpoint, cut: Windows, cache: Path) -> Reference:
    return Reference.build(source, cut, cache)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the source's id whenever a reference is computed."""
    found: list[str] = []
    compute = module._compute

    def noted(checkpoint: Checkpoint, wanted: Sequence[tuple[Windows, Path]]) -> None:
        found.append(checkpoint.id)
        compute(checkpoint, wanted)

    monkeypatch.setattr(module, "_compute", noted)
    return found


def test_what_is_stored_is_every_bit_of_what_the_model_gave(
    source: Checkpoint, reference: Reference, cut: Windows
) -> None:
    with TransformersScorer(source, 64) as scorer:
        given = list(scorer.hidden_states(cut.ids, [cut.first] * len(cut.ids)))
        assert torch.equal(reference.output, scorer.output_weight)
    assert len(reference.hidden) == len(given) == 7
    for stored, states in zip(reference.hidden, given, strict=True):
        assert torch.equal(stored, states[: cut.scored])
    assert torch.equal(torch.stack(reference.hidden[2:4]), torch.stack(list(reference.hidden))[2:4])


def test_its_logits_are_the_models_own_to_float32_rounding(
    tiny_llama: Path, reference: Reference, cut: Windows
) -> None:
    """Against transformers alone. A sum of 256 products is off by some √256 roundings."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for window, ids in enumerate(cut.ids):
        with torch.inference_mode():
            own = model(torch.tensor([ids])).logits[0, cut.first : -1]
        error = (reference.logits(window) - own).abs().max() / own.abs().max()
        assert error < 16 * torch.finfo(torch.float32).eps


def test_it_is_computed_once_and_found_by_its_content(
    source: Checkpoint,
    cut: Windows,
    reference: Reference,
    cache: Path,
    runs: list[str],
    tmp_path: Path,
) -> None:
    again = Reference.build(source, cut, cache)
    assert all(map(torch.equal, again.hidden, reference.hidden))
    elsewhere = Checkpoint.open(make_checkpoint(tmp_path / "the-same"))
    assert Reference.build(elsewhere, cut, cache).source == reference.source
    assert runs == []
    Reference.build(source, windows(list(range(500)), context=64), cache)
    Reference.build(Checkpoint.open(make_checkpoint(tmp_path / "other", seed=1)), cut, cache)
    assert runs == ["tiny-llama", "other"]


def test_the_output_layer_is_stored_only_where_the_checkpoint_lacks_it(
    source: Checkpoint,
    cut: Windows,
    reference: Reference,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (path, *_) = cache.iterdir()
    assert module._OUTPUT not in ZipFile(path).namelist()
    weight = TransformersScorer.output_weight
    scaled = property(lambda scorer: weight.fget(scorer) * 3)  # type: ignore[misc]
    monkeypatch.setattr(TransformersScorer, "output_weight", scaled)
    other = Reference.build(source, cut, tmp_path)
    assert torch.equal(other.output, reference.output * 3)


def test_any_float32_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (300, 64), generator=generator).to(torch.int32)
    bits[0, :4] = torch.tensor([0, -(2**31), 1, 0x7F800000])  # 0, -0, the least, infinity
    assert torch.equal(unpack(pack(bits.view(torch.float32)), 64).view(torch.int32), bits)


@pytest.mark.parametrize(("on_gpu", "limit"), [(False, 2.0), (True, 0.9)])
def test_wikitext_2_of_an_8b_shape_fits_in_2_gib(on_gpu: bool, limit: float) -> None:
    """Llama 3 8B reads it as 564 windows of 512; its output layer is the checkpoint's."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(4096, generator=generator).exp()  # channels differ as real ones do
    states = torch.randn(255, 4096, generator=generator) * scale
    if on_gpu:
        states = states.bfloat16().float()
    assert 564 * len(pack(states)) / 2**30 < limit


def test_one_window_is_read_at_a_time(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read = ZipFile.read

    def noted(archive: ZipFile, name: str) -> bytes:
        opened.append(name)
        return read(archive, name)

    monkeypatch.setattr(ZipFile, "read", noted)
    reference.logits(3)
    assert opened == ["windows/000003"]


def test_several_texts_take_one_start_of_the_source_and_share_its_output(
    source: Checkpoint, cut: Windows, tmp_path: Path, runs: list[str]
) -> None:
    others = {n: windows(list(range(n, n + 64)), context=64) for n in (1, 2)}
    found = Reference.of_texts(source, {"a": cut, "b": others[1]}, tmp_path)
    assert runs == ["tiny-llama"]
    assert found["a"].output is found["b"].output
    alone = Reference.build(source, others[1], tmp_path / "alone")
    assert torch.equal(found["b"].logits(0), alone.logits(0))
    assert found["b"].windows == others[1]
    # Only the text that is not known yet is computed.
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.zip")}
    Reference.of_texts(source, {"a": cut, "c": others[2]}, tmp_path)
    again = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.zip")}
    assert len(again) == 3
    assert kept.items() <= again.items()


def test_one_window_is_written_at_a_time(
    source: Checkpoint, cut: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    states = TransformersScorer.hidden_states

    def watched(
        scorer: TransformersScorer, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        seen: list[weakref.ref[torch.Tensor]] = []
        for rows in states(scorer, sequences, first):
            fresh = rows.clone()
            seen.append(weakref.ref(fresh))
            alive.append(sum(ref() is not None for ref in seen))
            yield fresh
            del fresh

    monkeypatch.setattr(TransformersScorer, "hidden_states", watched)
    Reference.build(source, cut, tmp_path)
    assert len(alive) == 7
    assert max(alive) <= 2


def test_a_source_that_is_not_finite_leaves_nothing(
    source: Checkpoint, cut: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = TransformersScorer.hidden_states

    def damaged(
        scorer: TransformersScorer, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        for index, rows in enumerate(states(scorer, sequences, first)):
            spoiled = rows.clone()
            spoiled[3:5, 7] = math.nan if index == 2 else spoiled[3:5, 7]
            yield spoiled

    monkeypatch.setattr(TransformersScorer, "hidden_states", damaged)
    with pytest.raises(EvaluationError, match=r"not finite \(2 of 217 positions\)"):
        Reference.build(source, cut, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(source: Checkpoint, cut: Windows, tmp_path: Path) -> None:
    Reference.build(source, cut, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EvaluationError, match=rf"{path.name}: damaged .*delete it"):
        Reference.build(source, cut, tmp_path)


def test_in_quantkits_home_the_least_recently_used_make_room(
    source: Checkpoint,
    cut: Windows,
    tmp_path: Path,
    runs: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path))
    texts = [windows(list(range(n, n + 64)), context=64) for n in range(4)]
    for text in texts[:3]:
        Reference.build(source, text)
    files = {file: file.stat() for file in (tmp_path / "references").iterdir()}
    oldest_first = sorted(files, key=lambda file: files[file].st_mtime_ns)
    assert len(files) == len(runs) == 3
    size = max(stat.st_size for stat in files.values())
    monkeypatch.setattr(module, "_ROOM", 3 * size + 100)
    Reference.build(source, texts[0])  # used again
    Reference.build(source, texts[3])
    assert len(runs) == 4
    left = set((tmp_path / "references").iterdir())
    assert set(files) - left == {oldest_first[1]}
    monkeypatch.setattr(module, "_ROOM", 0)
    assert Reference.build(source, texts[2]).logits(0).shape == (31, VOCABULARY)
    assert list((tmp_path / "references").iterdir()) == [oldest_first[2]]
    assert len(runs) == 4


def test_two_calls_of_evaluate_cost_one_pass_of_the_source(
    tiny_llama: Path, tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    for seed in (1, 2):
        variant = make_checkpoint(tmp_path / f"variant-{seed}", seed=seed)
        command = ["evaluate", str(variant), "--reference", str(tiny_llama), "--text", str(text)]
        ended = CliRunner().invoke(cli, [*command, "--context", "64", "--windows", "2"])
        assert ended.exit_code == 0, ended.output
    assert runs == ["tiny-llama"]
    assert len(list((tmp_path / "home" / "references").iterdir())) == 1
