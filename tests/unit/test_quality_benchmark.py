"""The quantizers' benchmark: its oracle, its rounding, its texts and its statistics."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks.quality import rounding, table, texts
from tests.benchmarks.quality.oracle import Oracle, Scores, divergence, replace_weights
from tests.models import write_tokenizer


def scores(*kld: float) -> Scores:
    return Scores(list(kld), [1.0] * len(kld), [1.0] * len(kld), [1.0] * len(kld))


def test_divergence_of_a_case_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    by_hand = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert divergence(p.log(), q.log()).item() == pytest.approx(by_hand, rel=1e-6)
    assert divergence(p.log(), p.log()).item() == 0


def test_oracle_scores_as_a_loop_over_positions_does(tmp_path: Path, tiny_llama: Path):
    ids = torch.randint(3, 1000, (2, 16), generator=torch.Generator().manual_seed(0))
    source = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    other = {name: tensor * 1.01 for name, tensor in source.state_dict().items()}
    oracle = Oracle(tiny_llama, {"any": ids}, torch.device("cpu"), tmp_path)
    found = oracle.score(other.items())["any"]
    changed = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    changed.load_state_dict(other)
    for window, kld, nll, top1 in zip(ids, found.kld, found.nll, found.top1, strict=True):
        klds, nlls, same = [], [], []
        for position in range(8, 15):
            with torch.no_grad():
                p, q = (
                    model(window[None, : position + 1]).logits[0, -1].double().softmax(0)
                    for model in (source, changed)
                )
            klds.append(float((p * (p / q).log()).sum()))
            nlls.append(-math.log(q[window[position + 1]]))
            same.append(float(p.argmax() == q.argmax()))
        assert kld == pytest.approx(fmean(klds), rel=1e-3)
        assert nll == pytest.approx(fmean(nlls), rel=1e-5)
        assert top1 == pytest.approx(fmean(same))
    assert max(oracle.score(())["any"].kld) == 0


def test_replace_weights_refuses_what_is_not_all_of_the_source(tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    state = dict(model.state_dict())
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match="lack " + name):
        replace_weights(model, [(k, v) for k, v in state.items() if k != name])
    with pytest.raises(ValueError, match="not a tensor of the source"):
        replace_weights(model, [*state.items(), ("model.layers.0.mlp.extra", torch.ones(1))])
    replace_weights(model, [*state.items(), (name.replace("weight", "bias"), torch.zeros(1))])


def test_round_symmetric_by_hand():
    # The scale is 7/7 = 1; then 14/7 = 2.
    weights = torch.tensor([[7.0, 1.4, -2.6, 0.0, -14.0, 3.1, 2.9, 0.0]])
    assert rounding.round_symmetric(weights, 4, 4).tolist() == [[7, 1, -3, 0, -14, 4, 2, 0]]


def test_round_asymmetric_by_hand():
    # Ranges of 15 and 30: scales 1 and 2, zeros 5 and 0.
    weights = torch.tensor([[-5.0, 10.0, 1.4, 0.6, 0.0, 30.0, 2.9, 5.2]])
    assert rounding.round_asymmetric(weights, 4, 4).tolist() == [[-5, 10, 1, 1, 0, 30, 2, 6]]


def test_texts_scored_are_never_calibrated_on(tmp_path: Path):
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration/c4.utf8").write_text("1 " * 3000 + "2 " * 1000)
    (tmp_path / "calibration/code.utf8").write_text(" ".join(map(str, range(1000, 3000))))
    ids = texts.calibration(tmp_path, tokenizer, ["c4", "code"], 100, 32, seed=0)
    assert ids.shape == (100, 32)
    assert set(tokenizer.decode(ids[::2].flatten())) == {"1", " "}
    assert len({tuple(window.tolist()) for window in ids[1::2]}) == 50
    scored = texts.scored(tmp_path, tokenizer, "c4", 40, 32)
    assert set(tokenizer.decode(scored.flatten())) == {"2", " "}
    assert texts.scored(tmp_path, tokenizer, "code", 3, 32).unique(dim=0).shape == (3, 32)


def test_ratio_and_its_error_are_those_of_windows_in_pairs():
    found, plain = scores(0.2, 0.4, 0.9), scores(0.4, 0.8, 1.8)
    assert table.ratio(found, plain) == pytest.approx((0.5, 0.0))
    over, error = table.ratio(scores(0.2, 0.5, 0.8), plain)
    assert over == pytest.approx(0.5)
    assert error == pytest.approx(stdev([0.0, 0.1, -0.1]) / math.sqrt(3))
