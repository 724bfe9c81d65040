from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from quantkit.engines.llamacpp.scorer import LlamaScorer
from quantkit.engines.transformers import TransformersScorer
from quantkit.errors import EngineError
from quantkit.formats.detect import open_variant
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert
from tests.models import VOCABULARY

LENGTHS = [700, 300, 299, 40, 7, 6, 2]


def _sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def tiny_f32(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    out = tmp_path_factory.mktemp("gguf")
    return convert(Checkpoint.open(tiny_llama), Spec.parse("gguf:F32"), None, out)


def test_agrees_with_transformers(tiny_f32: Variant, tiny_llama: Path) -> None:
    """Same weights, another implementation: what is left is the 16-bit KV cache."""
    sequences = _sequences()
    first = [350, 299, 0, 39, 3, 0, 1]
    with TransformersScorer(Checkpoint.open(tiny_llama), 1024) as scorer:
        expected = list(scorer.logits(sequences, first))
    with LlamaScorer(tiny_f32, 1024) as scorer:
        found = list(scorer.logits(sequences, first))
    assert [len(rows) for rows in found] == [len(rows) for rows in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * float(theirs.std()))


def test_several_sequences_in_a_batch_do_not_see_each_other(tiny_f32: Variant) -> None:
    sequences = _sequences()
    first = [len(s) - 2 for s in sequences]
    with LlamaScorer(tiny_f32, 1024) as scorer:
        together = list(scorer.logits(sequences, first))
        alone = [next(iter(scorer.logits([s], [f]))) for s, f in zip(sequences, first, strict=True)]
        again = list(scorer.logits(sequences, first))
    for one, other, repeated in zip(together, alone, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-2 * float(other.std()))
        assert torch.equal(one, repeated)


def test_logits_kept_by_the_caller_are_not_written_over(tiny_f32: Variant) -> None:
    with LlamaScorer(tiny_f32, 512) as scorer:
        rows = scorer.logits([[5] * 400, [9] * 400], [399, 399])
        kept = next(rows)
        copy = kept.clone()
        next(rows)
    assert torch.equal(kept, copy)


def test_what_llama_cpp_refuses_is_an_error_with_its_reason(
    tiny_f32: Variant, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_f32.weights.read_bytes()[:-1000])
    with (
        pytest.raises(EngineError, match=r"cannot load the model .*broken\.gguf.*: .*bounds"),
        LlamaScorer(Variant("broken", broken, "gguf", "F32", None), 512),
    ):
        pass
    with LlamaScorer(tiny_f32, 512) as scorer:
        with pytest.raises(EngineError, match="600 tokens, the scorer was opened for 512"):
            list(scorer.logits([[1] * 600], [0]))
        with pytest.raises(EngineError, match=r"llama_decode returned -1.*invalid token"):
            list(scorer.logits([[VOCABULARY + 5]], [0]))


def test_reads_a_file_that_has_no_manifest(tiny_f32: Variant, tmp_path: Path) -> None:
    copy = tmp_path / "somebody-elses.gguf"
    copy.write_bytes(tiny_f32.weights.read_bytes())
    assert gguf.GGUFReader(copy).tensors
    with LlamaScorer(open_variant(copy), 512) as scorer:
        (rows,) = scorer.logits([[1, 2, 3]], [1])
    assert rows.shape == (2, VOCABULARY)
