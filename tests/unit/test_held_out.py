"""Text that quantizers do not see: apart, by hand, and against whole models."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.mix import Mix, Part, judges
from quantkit.data.text import Text
from quantkit.data.texts import load_text
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Manifest
from quantkit.producers.convert import convert
from quantkit.quantize.deviation import deviation
from quantkit.quantize.rounding import plain_symmetric
from tests.plain_weights import plain_weights


def test_deviation_of_a_block_that_says_less_than_it_should() -> None:
    given = torch.randn(2, 5, 8)
    exact = given + torch.randn(2, 5, 8)
    found = deviation(given + 0.9 * (exact - given), exact, given)
    assert found.gain == pytest.approx(-0.1, abs=1e-6)
    assert found.error == pytest.approx(0.1, abs=1e-6)


def test_deviation_that_every_token_has_alike() -> None:
    given, exact = torch.zeros(1, 4, 3), torch.eye(4, 3)[None]
    found = deviation(exact + torch.tensor([0.0, 2.0, 0.0]), exact, given)
    # ‖Δ‖² = 4 · 4, ‖A‖² = 3, ⟨Δ, A⟩ = 2.
    assert found.error == pytest.approx((16 / 3) ** 0.5)
    assert found.gain == pytest.approx(2 / 3)
    assert found.mean_error == pytest.approx(1)
    alternating = torch.tensor([1.0, -1.0, 1.0, -1.0])[None, :, None] * torch.ones(3)
    assert deviation(exact + alternating, exact, given).mean_error == pytest.approx(0)
    assert deviation(exact, exact, given).mean_error == 0


def _text(name: str, words: str) -> Text:
    return Text(name, None, " ".join(f"{words} {number}" for number in range(4000)))


def _mix() -> Mix:
    texts = {"numbers": _text("a", "one"), "code": _text("b", "x = ")}
    return Mix("own", tuple(Part(kind, Fraction(1, 2), text) for kind, text in texts.items()))


@pytest.fixture(params=[64, 100], ids=["whole windows", "shorter than calibration's"])
def windows(request: pytest.FixtureRequest, tiny_llama: Path) -> Calibration:
    tokenizer = Checkpoint.open(tiny_llama).tokenizer
    size = {
        "samples": 16 if request.param == 64 else 10,
        "sequence_length": request.param,
        "seed": 0,
    }
    return calibrate(_mix(), tokenizer, precision="float32", **size)


def test_held_out_windows_are_none_of_the_calibration(windows: Calibration) -> None:
    assert set(windows.held_out) == {"numbers", "code"}
    seen = {tuple(row.tolist()[:64]) for row in windows.ids}
    for ids in windows.held_out.values():
        assert ids.shape == (1, 64)
        assert not seen & {tuple(row.tolist()) for row in ids}


@pytest.mark.parametrize(
    ("samples", "shape"),
    [(64, (2, 128)), (40, (2, 128)), (16, (1, 128)), (12, (1, 96)), (4, (1, 64))],
)
def test_held_out_windows_are_an_eighth_of_the_tokens(
    tiny_llama: Path, samples: int, shape: tuple[int, int]
) -> None:
    """Two windows of each of two kinds at most, and no fewer than 64 tokens of each."""
    tokenizer = Checkpoint.open(tiny_llama).tokenizer
    found = calibrate(_mix(), tokenizer, samples=samples, sequence_length=128, seed=0)
    assert {ids.shape for ids in found.held_out.values()} == {shape}


def test_held_out_windows_change_none_of_one_text(tiny_llama: Path) -> None:
    tokenizer = Checkpoint.open(tiny_llama).tokenizer
    text = _text("a", "one")
    other = calibrate(text, tokenizer, samples=8, sequence_length=64, seed=0, judges=_mix())
    alone = calibrate(text, tokenizer, samples=8, sequence_length=64, seed=0)
    assert torch.equal(other.ids, alone.ids)
    assert other.record == alone.record
    assert set(alone.held_out) == {"a"}
    assert set(other.held_out) == {"a", "code"}  # what is calibrated on is not judged on twice


def test_a_text_of_its_own_is_judged_on_all_kinds_and_the_mix_on_itself() -> None:
    kinds = judges(load_text("pydoc:calibration"))
    assert kinds is not None
    assert {"code", "chat", "languages"} <= {part.kind for part in kinds.parts}
    assert judges(kinds) is None
    assert judges(_mix()) == kinds


def _manifest(source: Checkpoint, windows: Calibration, out: Path) -> Manifest:
    manifest = convert(source, Spec.parse("gptq:w4g64"), windows, out).manifest
    assert manifest is not None
    return manifest


def test_losses_are_those_of_the_whole_models(
    tiny_llama: Path, windows: Calibration, tmp_path: Path
) -> None:
    """As a plain loop finds them, with all of the model in memory and nothing streamed."""
    source = Checkpoint.open(tiny_llama)
    manifest = _manifest(source, windows, tmp_path)
    weights = dict(plain_weights(tmp_path / "gptq-w4g64"))

    def model(rounded: bool | None) -> torch.nn.Module:
        found = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        for name, parameter in found.named_parameters():
            if "_proj" not in name or rounded is None:
                continue
            plain = plain_symmetric(parameter.data, 4, 64, source.dtype).dequantize()
            parameter.data = plain if rounded else weights[name].float()
        return found.eval()

    exact, quantized, rounded = (model(rounded) for rounded in (None, False, True))
    assert set(manifest.held_out) == set(windows.held_out)
    for kind, ids in windows.held_out.items():
        with torch.no_grad():
            p, q, r = (m(ids).logits.log_softmax(-1) for m in (exact, quantized, rounded))
        loss = manifest.held_out[kind]
        assert loss.kld == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=2e-3)
        assert loss.rounding_kld == pytest.approx(
            float((p.exp() * (p - r)).sum(-1).mean()), rel=2e-3
        )
        assert 0 < loss.kld < loss.rounding_kld


def test_each_block_says_its_gain_on_each_kind(
    tiny_llama: Path, windows: Calibration, tmp_path: Path
) -> None:
    blocks = _manifest(Checkpoint.open(tiny_llama), windows, tmp_path).blocks
    assert len(blocks) == 2
    for block in blocks:
        assert set(block.held_out) == {"numbers", "code"}
        for found in (block.calibration, *block.held_out.values()):
            assert 0 < found.error < 0.5
            assert abs(found.gain) < found.error
            assert 0 <= found.mean_error <= 1
