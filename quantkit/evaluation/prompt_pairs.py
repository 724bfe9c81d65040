"""Two answers to one prompt side by side, and what many such pairs come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch

from quantkit.engines.prefixes import common
from quantkit.evaluation.prompt_file import Prompt, Prompts
from quantkit.evaluation.statistics import clustered_mean, proportion
from quantkit.ledger.prompt_drift import AnswerPair, PromptDrift, PromptGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_DIFFERENT = 5
_BEFORE = 240
"""Characters shown of the end of a prompt, and of what two answers have in common."""
_AFTER = 400
"""Characters that are shown of each answer from the difference on."""


@dataclass(frozen=True)
class Pair:
    """The reference's greedy answer to a prompt and a variant's, as ids and as text.

    ``kld``: ``(len(reference),) float64``, nats, at each token of the reference's answer.
    """

    prompt: Prompt
    reference: tuple[int, ...]
    answer: tuple[int, ...]
    reference_text: str
    text: str
    kld: torch.Tensor

    @property
    def exact(self) -> bool:
        """Whether both are the same ids."""
        return self.reference == self.answer

    @property
    def same_text(self) -> bool:
        """Whether both read the same, but for the space around them."""
        return self.reference_text.strip() == self.text.strip()

    @property
    def first_difference(self) -> int | None:
        """Which token is the first to differ, counted from 1; None where none does."""
        return None if self.exact else common(self.reference, self.answer) + 1

    @property
    def kld_mean(self) -> float:
        """Nats per token."""
        return float(self.kld.mean())

    def details(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "line": self.prompt.line,
            "id": self.prompt.id,
            "category": self.prompt.category,
            "exact_match": self.exact,
            "text_match": self.same_text,
            "first_difference": self.first_difference,
            "kld_mean": self.kld_mean,
            "reference_text": self.reference_text,
            "text": self.text,
            "prompt_ids": list(self.prompt.ids),
            "reference_ids": list(self.reference),
            "ids": list(self.answer),
            "kld": self.kld.tolist(),
        }


def pair(
    prompt: Prompt,
    reference: tuple[int, ...],
    answer: tuple[int, ...],
    kld: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> Pair:
    """Put two answers side by side; their texts are without special tokens."""
    said, text = (_decode(tokenizer, ids) for ids in (reference, answer))
    return Pair(prompt, reference, answer, said, text, kld)


def summarize(
    pairs: Sequence[Pair], prompts: Prompts, tokenizer: PreTrainedTokenizerBase
) -> PromptDrift:
    """All pairs in one, by category, and the most different ones."""
    names = list(dict.fromkeys(one.prompt.category for one in pairs))
    different = [one for one in pairs if not one.same_text]
    different.sort(key=lambda one: -one.kld_mean)
    return PromptDrift(
        overall=_group(None, pairs, prompts),
        categories=[
            _group(name, [one for one in pairs if one.prompt.category == name], prompts)
            for name in names
            if names != [None]
        ],
        most_different=[_shown(one, tokenizer) for one in different[:_MOST_DIFFERENT]],
    )


def _group(category: str | None, pairs: Sequence[Pair], prompts: Prompts) -> PromptGroup:
    exact = proportion(torch.tensor([one.exact for one in pairs]))
    text = proportion(torch.tensor([one.same_text for one in pairs]))
    kld = clustered_mean([one.kld for one in pairs])
    places = [place for one in pairs if (place := one.first_difference) is not None]
    return PromptGroup(
        category=category,
        n=len(pairs),
        exact_match=exact.value,
        exact_match_stderr=exact.stderr,
        text_match=text.value,
        text_match_stderr=text.stderr,
        first_difference_mean=fmean(places) if places else None,
        first_difference_median=median(places) if places else None,
        kld_mean=kld.value,
        kld_stderr=kld.stderr,
        reference_tokens=fmean(len(one.reference) for one in pairs),
        tokens=fmean(len(one.answer) for one in pairs),
        reference_cut=sum(not prompts.ended(one.reference) for one in pairs),
        cut=sum(not prompts.ended(one.answer) for one in pairs),
    )


def _shown(one: Pair, tokenizer: PreTrainedTokenizerBase) -> AnswerPair:
    alike = common(one.reference, one.answer)
    # Up to the token that differs: two words may begin alike and be other tokens all the same.
    texts = (_decode(tokenizer, one.reference[:alike]), one.reference_text, one.text)
    letters = takewhile(lambda ones: len(set(ones)) == 1, zip(*texts, strict=False))
    before = "".join(letter for letter, *_ in letters)
    return AnswerPair(
        id=one.prompt.id,
        category=one.prompt.category,
        prompt=_last(one.prompt.text),
        common=_last(before),
        reference=_first(one.reference_text[len(before) :]),
        answer=_first(one.text[len(before) :]),
        first_difference=alike + 1,
        kld=one.kld_mean,
        reference_tokens=len(one.reference),
        tokens=len(one.answer),
    )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def _last(text: str) -> str:
    return text if len(text) <= _BEFORE else "…" + text[-_BEFORE:]


def _first(text: str) -> str:
    return text if len(text) <= _AFTER else text[:_AFTER] + "…"
