from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path

import pytest
import torch

from quantkit.data.calibration import bos_id
from quantkit.errors import EvaluationError
from quantkit.evaluation import divergence, statistics
from quantkit.evaluation.perplexity import windows
from quantkit.models.tokenizer import load_tokenizer
from tests.models import VOCABULARY, begin_with_bos, write_tokenizer


def test_windows_do_not_overlap_and_their_second_half_is_scored() -> None:
    cut = windows(list(range(100, 121)), context=8)
    assert cut.ids == (tuple(range(100, 108)), tuple(range(108, 116)))  # 5 ids are left over
    assert (cut.first, cut.scored) == (4, 3)
    # Positions 4, 5, 6 of the second window predict its ids at 5, 6, 7.
    assert cut.targets(1).tolist() == [113, 114, 115]


def test_bos_replaces_the_first_id_of_each_window() -> None:
    cut = windows(list(range(100, 116)), context=8, bos_id=1)
    assert cut.ids == ((1, *range(101, 108)), (1, *range(109, 116)))
    assert cut.protocol()["bos"] == 1
    assert cut.protocol() != windows(list(range(100, 116)), context=8).protocol()


def test_limit_and_hash_of_the_ids() -> None:
    cut = windows(list(range(100, 164)), context=8, limit=2)
    assert len(cut.ids) == 2
    packed = struct.pack("<16i", *range(100, 116))
    assert cut.sha256 == hashlib.sha256(packed).hexdigest()


def test_a_text_too_short_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="7 tokens, expected at least one window of 8"):
        windows(list(range(7)), context=8)


def test_bos_is_what_the_tokenizer_does_not_what_it_declares(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).bos_token_id == 1
    assert bos_id(load_tokenizer(tmp_path)) is None
    begin_with_bos(tmp_path)
    assert bos_id(load_tokenizer(tmp_path)) == 1


def test_uniform_logits_give_the_vocabulary_as_perplexity() -> None:
    logits = torch.full((100, VOCABULARY), 3.25)
    values = divergence.score(logits, torch.arange(100))
    ppl = statistics.perplexity(values.nll)
    assert ppl.value == pytest.approx(VOCABULARY, rel=1e-12)
    assert ppl.stderr == pytest.approx(0, abs=1e-9)


def test_perplexity_by_hand() -> None:
    # p(target) = 1/2 and 1/8: ppl = (2 x 8)^(1/2) = 4; nll = ln 2, ln 8, their s = ln 4 / √2.
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]).log()
    ppl = statistics.perplexity(divergence.score(logits, torch.tensor([0, 2])).nll)
    assert ppl.value == pytest.approx(4, rel=1e-6)
    assert ppl.stderr == pytest.approx(4 * math.log(4) / 2, rel=1e-6)
    assert ppl.n == 2
