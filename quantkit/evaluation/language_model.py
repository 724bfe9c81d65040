"""lm-eval's model class over any engine's language model.

It tokenizes as lm-eval's ``hf`` model does (``lm_eval.models.huggingface.HFLM``), so that both
give the same numbers and the same answers for the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lm_eval import utils as lm_eval_utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix

from quantkit.engines.base import LanguageModel
from quantkit.engines.prefixes import runs
from quantkit.errors import EvaluationError
from quantkit.evaluation.generation import Generation
from quantkit.system.files import sha256_json
from quantkit.system.progress import say, track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OpenModel = Callable[[int], AbstractContextManager[LanguageModel]]
"""Loads the model for sequences of at most this many tokens."""

_ROOM = 2048
"""The least context with which a model that stays loaded is opened: the next task may need more."""

_Request = tuple[tuple[str, str], list[int], list[int]]


class EngineLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of a language model, which is opened once all questions are known.

    ``max_length``: the most tokens that the model reads; ``end_ids``: what ends an answer;
    ``task``: for messages.
    """

    def __init__(
        self,
        open_model: OpenModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        task: str,
        end_ids: Iterable[int] = (),
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._open_model = open_model
        self._task = task
        self._end_ids = frozenset({*end_ids, self.eot_token_id})
        self._asked: list[str] = []

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

    @property
    def prompts_sha256(self) -> str | None:
        """Digest of all questions as text; None before any was asked."""
        return self._asked[0] if len(self._asked) == 1 else sha256_json(self._asked)

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

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model was trained to read it."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Likelihood of each continuation after its context; trailing spaces move to it."""
        self._note(requests)
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Likelihood of whole texts, in windows of ``max_length`` where they are longer."""
        self._note(requests)
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

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes after each context, greedily, up to the task's stop strings."""
        self._note(requests)
        asked: dict[Generation, list[tuple[list[int], int]]] = {}
        for i, request in enumerate(requests):
            context, options = request.args
            how = Generation.of(options, self._task)
            asked.setdefault(how, []).append((self._prompt(context, how), i))
        answers = [""] * len(requests)
        context = max(len(ids) + how.max_tokens for how, group in asked.items() for ids, _ in group)
        with self._open_model(context) as model:
            for how, group in asked.items():
                group.sort()
                ends = how.ends(self.tokenizer, self._end_ids)
                written = model.generate([ids for ids, _ in group], how.max_tokens, ends)
                what = f"{self._task}: answers"
                for (_, i), ids in zip(group, track(written, what, len(group)), strict=True):
                    answers[i] = how.text(self.tokenizer, ids)
        return answers

    def _prompt(self, context: str, how: Generation) -> list[int]:
        """The context's last tokens, as many as leave the answer its room."""
        room = self.max_length - how.max_tokens
        if room < 1:
            raise EvaluationError(
                f"{self._task}: an answer of up to {how.max_tokens} tokens leaves no room for a "
                f"question in the {self.max_length} that the model takes; lower max_gen_toks"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        if len(ids) > room:
            say(f"{self._task}: a prompt of {len(ids)} tokens cut to its last {room}")
        return ids[-room:]

    def _note(self, requests: Sequence[Instance]) -> None:
        self._asked.append(sha256_json([request.args for request in requests]))

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
                    f"{self._task}: a continuation of {len(continuation)} tokens; expected 1 to "
                    f"{self.max_length}, the model's maximum"
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            cut += len(ids) < len(context) + len(continuation)
            asked.setdefault(tuple(ids), []).append(i)
        if cut:
            say(f"{self._task}: {cut} of {len(requests)} prompts cut to {self.max_length} tokens")
        sequences = _in_order(asked)
        needed = [max(len(requests[i][2]) for i in asked[ids]) for ids in sequences]
        first = [len(ids) - count for ids, count in zip(sequences, needed, strict=True)]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        non_finite = 0
        with self._open_model(max(map(len, sequences)) - 1) as model:
            what = f"{self._task}: questions"
            found = track(model.likelihoods(sequences, first), what, len(sequences))
            for sequence, scores in zip(sequences, found, strict=True):
                non_finite += not bool(scores.log_probs.isfinite().all())
                for i in asked[sequence]:
                    count = len(requests[i][2])
                    chosen, same = scores.log_probs[-count:], scores.is_top[-count:]
                    answers[i] = (float(chosen.sum()), bool(same.all()))
        if non_finite:
            raise EvaluationError(
                f"{self._task}: non-finite likelihoods in {non_finite} of {len(sequences)} "
                "sequences; the model is damaged"
            )
        return answers


class KeptModel:
    """Loads a model once for many calls, and again only for sequences that are much longer."""

    def __init__(self, open_model: OpenModel, longest: int) -> None:
        self._open_model = open_model
        self._longest = longest
        self._stack = ExitStack()
        self._model: LanguageModel | None = None
        self._context = 0

    @contextmanager
    def __call__(self, context: int) -> Iterator[LanguageModel]:
        """The model for sequences of up to ``context`` tokens; it stays loaded afterwards."""
        if self._model is None or context > self._context:
            self.close()
            room = max(_ROOM, 1 << (context - 1).bit_length())
            self._context = max(context, min(self._longest, room))
            self._model = self._stack.enter_context(self._open_model(self._context))
        yield self._model

    def close(self) -> None:
        """Free the model."""
        self._stack.close()
        self._model = None


def _in_order(asked: Mapping[tuple[int, ...], Any]) -> list[tuple[int, ...]]:
    """Sequences that begin alike side by side; then those that don't, the longest first: of
    these an engine computes several of about one length together."""
    ordered = sorted(asked)
    shared: list[tuple[int, ...]] = []
    others: list[tuple[int, ...]] = []
    for run in runs(ordered):
        (shared if run.shared else others).extend(ordered[run.start : run.stop])
    return shared + sorted(others, key=len, reverse=True)
