"""lm-eval's model class over a Scorer.

It tokenizes as lm-eval's ``hf`` model does (``lm_eval.models.huggingface.HFLM``), so that both
give the same numbers for the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import utils as lm_eval_utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix

from quantkit.engines.base import Scorer
from quantkit.errors import EvaluationError
from quantkit.files import sha256_json
from quantkit.progress import say, track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OpenScorer = Callable[[int], AbstractContextManager[Scorer]]
"""Loads the model for sequences of up to so many tokens."""

WRITES = (
    "{task}: asks the model to write, and generation tasks come later; take one that compares "
    "likelihoods, for example mmlu, arc_easy or hellaswag"
)

_Request = tuple[tuple[str, str], list[int], list[int]]


class ScorerLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of a Scorer; the model is loaded once all questions are known.

    Questions that share their tokens up to the last, as the choices of MMLU do, are one pass.
    """

    def __init__(
        self,
        open_scorer: OpenScorer,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        what: str,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.prompts_sha256: str | None = None
        self._open_scorer = open_scorer
        self._what = what

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS where there is one, else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches, which are not used."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encode with the special tokens that the tokenizer itself adds, and no second BOS."""
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **special)
        return ids

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Likelihood of each continuation after its context; trailing spaces move to it."""
        self.prompts_sha256 = sha256_json([request.args for request in requests])
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Likelihood of whole texts, in windows of ``max_length`` where they are longer."""
        self.prompts_sha256 = sha256_json([request.args for request in requests])
        windows: list[_Request] = []
        counts = []
        for request in requests:
            (text,) = request.args
            cut = lm_eval_utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [lm_eval_utils.make_disjoint_window(window) for window in cut]
            windows += [(("", ""), context, continuation) for context, continuation in parts]
            counts.append(len(parts))
        found = iter(self._loglikelihood_tokens(windows))
        return [sum(next(found)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance]) -> list[str]:  # noqa: ARG002
        """Raise EvaluationError: not yet."""
        raise EvaluationError(WRITES.format(task=self._what))

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], **_: Any
    ) -> list[tuple[float, bool]]:
        """(ln p of the continuation, whether it is the greedy one) for each request, in order.

        ``requests``: (anything, context ids, continuation ids). What exceeds the model's maximum
        is cut on the left, as lm-eval does; how often is said.
        """
        asked: dict[tuple[int, ...], list[int]] = {}
        cut = 0
        for i, (_text, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise EvaluationError(
                    f"{self._what}: a continuation of {len(continuation)} tokens; expected 1 to "
                    f"{self.max_length}, the model's maximum"
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            cut += len(ids) < len(context) + len(continuation)
            asked.setdefault(tuple(ids[:-1]), []).append(i)
        if cut:
            say(f"{self._what}: {cut} of {len(requests)} prompts cut to {self.max_length} tokens")
        sequences = sorted(asked, key=lambda ids: (-len(ids), ids))
        needed = [max(len(requests[i][2]) for i in asked[ids]) for ids in sequences]
        first = [len(ids) - count for ids, count in zip(sequences, needed, strict=True)]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        non_finite = 0
        with self._open_scorer(len(sequences[0])) as scorer:
            what = f"{self._what}: questions"
            rows = track(scorer.logits(sequences, first), what, len(sequences))
            for sequence, logits in zip(sequences, rows, strict=True):
                non_finite += not bool(logits.isfinite().all())
                log_probs = logits.log_softmax(-1)
                greedy = logits.argmax(-1)
                for i in asked[sequence]:
                    wanted = torch.tensor(requests[i][2])
                    chosen = log_probs[-len(wanted) :].gather(-1, wanted[:, None])
                    same = bool((greedy[-len(wanted) :] == wanted).all())
                    answers[i] = (float(chosen.sum()), same)
        if non_finite:
            raise EvaluationError(
                f"{self._what}: non-finite logits in {non_finite} of {len(sequences)} sequences; "
                "the model is damaged"
            )
        return answers
