"""A loss taken apart: the arithmetic by hand, and GGUF weights unpacked, by hand too."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from quantkit.engines.base import TokenScores
from quantkit.engines.transformers import Transformers
from quantkit.errors import EvaluationError, IncompatibleVariant
from quantkit.evaluation.perplexity import windows
from quantkit.evaluation.split import parts, window_likelihoods
from quantkit.formats.gguf.architectures import inverses, transforms
from quantkit.formats.gguf.unpacked import UnpackedGGUF
from quantkit.models.checkpoint import Checkpoint
from tests.integration.gguf_oracle import convert
from tests.models import VOCABULARY, make_checkpoint

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 3}


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Checkpoint:
    return Checkpoint.open(tiny_llama)


def test_parts_by_hand() -> None:
    base, own = [2.0, 3.0, 4.0], [2.1, 3.2, 4.6]
    served, plain = [2.3, 3.1, 4.6], [2.01, 3.01, 4.01]
    found = parts(base, own, served, plain)
    assert list(found) == ["conversion", "quantization", "engine", "total"]
    assert found["conversion"].value == pytest.approx(0.01)
    assert found["conversion"].stderr == pytest.approx(0, abs=1e-12)
    assert found["quantization"].value == pytest.approx(0.3)
    # 0.1, 0.2 and 0.6: deviations of -0.2, -0.1 and 0.3 from the mean.
    assert found["quantization"].stderr == pytest.approx(math.sqrt(0.14 / 2 / 3))
    # 0.2, -0.1 and 0 less the conversion's 0.01.
    assert found["engine"].value == pytest.approx(0.1 / 3 - 0.01)
    assert found["total"].value == pytest.approx(1 / 3)


def test_parts_add_up_with_and_without_a_conversion() -> None:
    rng = np.random.default_rng(0)
    base, own, served, plain = rng.normal(3, 1, (4, 25)).tolist()
    for converted in (plain, None):
        found = parts(base, own, served, converted)
        whole = found.pop("total")
        assert len(found) == (3 if converted else 2)
        assert sum(part.value for part in found.values()) == pytest.approx(whole.value, abs=1e-12)


def test_rounded_activations_have_a_part_of_their_own() -> None:
    base, weights, own, served = [1.0, 2.0], [1.1, 2.1], [1.4, 2.4], [1.5, 2.5]
    found = parts(base, own, served, None, weights)
    assert list(found) == ["quantization", "activations", "engine", "total"]
    values = [found[name].value for name in found]
    assert values == pytest.approx([0.1, 0.3, 0.1, 0.5])


def test_what_was_not_measured_is_left_out() -> None:
    assert list(parts([1.0, 2.0], [1.5, 2.0], None, None)) == ["quantization", "total"]
    found = parts([1.0, 2.0], None, [1.5, 2.0], [1.1, 2.1])
    assert list(found) == ["conversion", "total"]
    assert found["total"].value == 0.25
    assert parts([1.0], [1.5], None, None)["total"].stderr is None


def test_likelihoods_of_windows_against_a_slow_loop(source: Checkpoint) -> None:
    ids = torch.randint(VOCABULARY, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    cut = windows(ids, context=32)
    found = window_likelihoods(source, Transformers(), cut)
    with Transformers().scorer(source, 32) as scorer:
        for window, mean in zip(cut.ids, found, strict=True):
            (logits,) = scorer.logits([window], [0])
            log_probs = logits.double().log_softmax(-1)
            # Position 16 is the first that is scored: it predicts token 17.
            total = sum(-float(log_probs[t, window[t + 1]]) for t in range(16, 31))
            assert mean == pytest.approx(total / 15, abs=1e-5)


def test_likelihoods_that_are_no_numbers_are_refused(source: Checkpoint) -> None:
    class Broken(Transformers):
        @contextmanager
        def language_model(self, model: object, context: int) -> Iterator[Broken]:  # type: ignore[override]
            yield self

        def likelihoods(
            self, sequences: Sequence[Sequence[int]], first: Sequence[int]
        ) -> Iterator[TokenScores]:
            for number, (ids, start) in enumerate(zip(sequences, first, strict=True)):
                values = torch.full((len(ids) - start,), -math.inf if number else -1.0)
                yield TokenScores(values, values > 0)

    cut = windows(list(range(96)), context=32)
    with pytest.raises(EvaluationError, match="non-finite likelihoods in 2 of 3 windows"):
        window_likelihoods(source, Broken(), cut)


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_inverses_undo_the_transforms(shape: tuple[int, ...]) -> None:
    rows = torch.randn(shape)
    for transform in (
        transforms.interleave_queries,
        transforms.interleave_keys,
        transforms.ungroup_heads,
        transforms.transpose,
    ):
        changed = transform(rows, HEADS)
        assert changed.shape != rows.shape or len(shape) == 1 or not torch.equal(changed, rows)
        assert torch.equal(inverses.restore([(transform, changed)], HEADS), rows)
    assert torch.equal(inverses.restore([(None, rows)], HEADS), rows)


def test_latent_parts_are_joined_and_gemmas_one_is_taken_away() -> None:
    rows = torch.randn(2 * (4 + 5), 6)
    c = HEADS | {"qk_nope_head_dim": 4, "v_head_dim": 5}
    both = [(t, t(rows, c)) for t in (transforms.latent_values, transforms.latent_keys)]
    assert torch.equal(inverses.restore(both, c), rows)
    # With eight bits and no smaller than this nothing is rounded when 1 is added.
    norm = torch.tensor([-1.5, 2.0**-16, 0.0, 0.25]).bfloat16()
    restored = inverses.restore([(transforms.plus_one, transforms.plus_one(norm, c))], c)
    assert torch.equal(restored, norm.float())


def test_tiled_heads_are_grouped_again_and_halves_joined() -> None:
    c = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_v": 24}
    # Three value heads to a key head: the first of each, then the second of each, the third.
    assert transforms.tile(torch.arange(6), c).tolist() == [0, 3, 1, 4, 2, 5]
    assert transforms.tile(torch.arange(12), c).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    for transform, rows in (
        (transforms.tile, torch.randn(24, 5)),
        (transforms.tile_columns, torch.randn(5, 24)),
        (transforms.tile_after_keys, torch.randn(30, 5)),
        (transforms.tiled_kernel, torch.randn(30, 1, 4)),
        (transforms.kernel, torch.randn(30, 1, 4)),
        (transforms.turned, torch.randn(3, 4, 5)),
    ):
        changed = transform(rows, c)
        assert changed.shape != rows.shape or not torch.equal(changed, rows)
        assert torch.equal(inverses.restore([(transform, changed)], c), rows)
    stack = torch.randn(3, 8, 6)
    for pair in (
        (transforms.second_half, transforms.first_half),
        (transforms.second_of_pairs, transforms.first_of_pairs),
    ):
        for whole in (stack, stack[0])[: 1 + (pair[0] is transforms.second_of_pairs)]:
            assert inverses.invertible(pair)
            found = inverses.restore([(part, part(whole, c)) for part in pair], c)
            assert torch.equal(found, whole)


def test_only_what_can_be_undone_is_invertible() -> None:
    assert inverses.invertible([None])
    assert inverses.invertible([transforms.plus_one])
    assert inverses.invertible([transforms.latent_keys, transforms.latent_values])
    assert not inverses.invertible([transforms.latent_keys])
    assert not inverses.invertible([lambda rows, _: rows])
    assert not inverses.invertible([None, None])


@pytest.mark.parametrize("scheme", ["Q4_0", "Q8_0"])
def test_a_quantized_file_unpacks_as_gguf_does_with_the_permutation_undone(
    source: Checkpoint, tmp_path: Path, scheme: str
) -> None:
    file = convert(source, scheme, tmp_path / "made")
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(file).tensors
    }
    unpacked = UnpackedGGUF.of(source, file)
    assert unpacked.tensors.keys() == source.tensors.keys()
    for block in range(2):
        for name, heads in (("q", 4), ("k", 2)):
            rows = stored[f"blk.{block}.attn_{name}.weight"]
            slow = np.empty_like(rows)
            for row in range(len(rows)):
                head, channel = divmod(row, 64)
                half, pair = divmod(channel, 32)
                slow[row] = rows[head * 64 + 2 * pair + half]
            assert heads * 64 == len(rows)
            found = unpacked.read(f"model.layers.{block}.self_attn.{name}_proj.weight")
            assert np.array_equal(found.float().numpy(), slow)
        plain = {"mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v"}
        for ours, theirs in plain.items():
            found = unpacked.read(f"model.layers.{block}.{ours}.weight")
            assert np.array_equal(found.float().numpy(), stored[f"blk.{block}.{theirs}.weight"])
    found = unpacked.read("model.embed_tokens.weight")
    assert np.array_equal(found.float().numpy(), stored["token_embd.weight"])
    assert not torch.equal(found.float(), source.read("model.embed_tokens.weight").float())


def test_a_file_of_another_source_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    other = Checkpoint.open(make_checkpoint(tmp_path / "other", intermediate_size=256))
    file = convert(other, "BF16", tmp_path / "made")
    with pytest.raises(IncompatibleVariant, match=r"ffn_down.*made from tiny-llama"):
        UnpackedGGUF.of(source, file)


def test_an_architecture_without_inverses_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "unknown"
    shutil.copytree(source.path, path)
    config = (path / "config.json").read_text().replace("LlamaForCausalLM", "LlamoForCausalLM")
    (path / "config.json").write_text(config)
    with pytest.raises(IncompatibleVariant, match="a LlamoForCausalLM, whose GGUF quantkit does"):
        UnpackedGGUF.of(Checkpoint.open(path), tmp_path / "model.gguf")
