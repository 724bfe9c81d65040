"""What an lm-eval task asks of a written answer: where it stops, and how long it may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from quantkit.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_TOKENS = 256
"""lm-eval's own, where a task does not say."""
_NEUTRAL: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0}
"""What greedy decoding does anyway."""
_OF_SAMPLING = frozenset({"temperature", "top_k", "top_p", "min_p", "seed"})
"""Means nothing to greedy decoding."""


@dataclass(frozen=True)
class Generation:
    """Greedy, to the first of the strings in ``until`` and ``max_tokens`` tokens at most."""

    until: tuple[str, ...]
    max_tokens: int

    @classmethod
    def of(cls, options: Mapping[str, Any], task: str) -> Generation:
        """Read a task's ``generation_kwargs``; raise EvaluationError for other than greedy."""
        asked = dict(normalize_gen_kwargs(dict(options), _MAX_TOKENS))
        until, max_tokens = asked.pop("until"), asked.pop("max_gen_toks")
        if asked.pop("do_sample"):
            asked["do_sample"] = True
        other = {
            name: value
            for name, value in asked.items()
            if name not in _OF_SAMPLING and value != _NEUTRAL.get(name)
        }
        if other:
            said = ", ".join(f"{name}: {value}" for name, value in other.items())
            raise EvaluationError(
                f"{task}: asks for {said}, and quantkit writes greedily, so that two engines can "
                "be compared; leave it out of the task's generation_kwargs"
            )
        return cls(tuple(stop for stop in until if stop), max_tokens)

    def ends(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]
    ) -> Callable[[Sequence[int]], bool]:
        """Whether an answer ends with its last token: an end of the model's own, or a stop string
        that its last tokens spell, however they cut it."""
        # Every token spells a byte at least; a few more, where a tokenizer drops what is first.
        reach = max((len(stop.encode()) for stop in self.until), default=0) + 4

        def ended(answer: Sequence[int]) -> bool:
            if answer[-1] in end_ids:
                return True
            if not self.until:
                return False
            tail = tokenizer.decode(answer[-reach:], skip_special_tokens=True)
            return any(stop in tail for stop in self.until)

        return ended

    def text(self, tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> str:
        """The answer up to its first stop string, without special tokens."""
        written = tokenizer.decode(answer, skip_special_tokens=True)
        found: str = postprocess_generated_text(written, list(self.until), None)
        return found
