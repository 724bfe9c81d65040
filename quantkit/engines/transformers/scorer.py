"""Full logits from transformers, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from quantkit.engines import greedy
from quantkit.engines.base import Scorer, check_context
from quantkit.engines.prefixes import runs
from quantkit.engines.transformers.session import Cached, Recomputed
from quantkit.engines.transformers.shared import compute, scaled_by_length, shareable
from quantkit.engines.transformers.weights import load
from quantkit.errors import EngineError, IncompatibleVariant
from quantkit.models.variant import Model

if TYPE_CHECKING:
    import torch

_TOKENS_PER_BATCH = {"cpu": 512, "cuda": 8192}
"""What keeps the device busy; on a CPU more than a few hundred rows only leave its cache."""
_TOKENS_PER_STEP = {"cpu": 512, "cuda": 2048}
"""Where sequences share their beginning: each token's attention covers the whole step."""
_PROMPTS = {"cpu": 8, "cuda": 64}
"""Answered at the same time."""
_TOKENS_ANSWERED = {"cpu": 8192, "cuda": 65536}
"""Tokens of these prompts and their answers together, which bounds their KV cache."""


class TransformersScorer(Scorer):
    """A model in float32 on the CPU, in bfloat16 on a GPU that has it, loaded within ``with``.

    ``batch``: how many times as many sequences that share nothing go together as usual.
    ``exact_inputs``: whether the inputs of linears stay as they are where engines round them.
    """

    def __init__(
        self, model: Model, context: int, batch: int = 1, *, exact_inputs: bool = False
    ) -> None:
        self._source = model
        self._context = context
        self._batch = batch
        self._exact_inputs = exact_inputs

    def __enter__(self) -> TransformersScorer:
        import torch

        cuda = torch.cuda.is_available()
        self._device = torch.device("cuda" if cuda else "cpu")
        dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
        model = load(self._source, dtype, exact_inputs=self._exact_inputs)
        self._model = model.to(self._device)
        output: torch.Tensor = self._model.get_output_embeddings().weight
        self._output = output.detach().float()
        self._check_output_layer()
        self._scaled = scaled_by_length(self._model, self._context)
        self._shareable = not self._scaled and shareable(self._model)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import torch

        del self._model, self._output
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def output_weight(self) -> torch.Tensor:
        """The output layer, ``(vocabulary, hidden) float32`` on the CPU."""
        return self._output.cpu()

    def logits(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        """See ``Scorer.logits``: the output layer runs at the positions asked for only."""
        for hidden, rows in self._hidden(sequences, first):
            logits = (hidden @ self._output.T).cpu()
            yield from (logits[of_one] for of_one in rows)

    def hidden_states(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        """What the output layer is given: ``(len - first, hidden) float32``, on the CPU."""
        for hidden, rows in self._hidden(sequences, first):
            states = hidden.cpu()
            yield from (states[of_one] for of_one in rows)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        ends: Callable[[Sequence[int]], bool],
    ) -> Iterator[list[int]]:
        """See ``LanguageModel.generate``."""
        greedy.check_lengths("transformers", prompts, max_tokens, self._context)
        kind = self._device.type
        for batch in greedy.batches(prompts, max_tokens, _PROMPTS[kind], _TOKENS_ANSWERED[kind]):
            session: greedy.Session
            if self._scaled:
                session = Recomputed(self)
            else:
                tokens = _TOKENS_PER_BATCH[kind]
                session = Cached(self._model, self._output, tokens, share=self._shareable)
            yield from greedy.write(session, batch, max_tokens, ends)

    def _hidden(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, list[Any]]]:
        """Final hidden states, and which of them are the outputs of the next sequences."""
        self._check(sequences)
        for run in runs(sequences):
            some, starts = sequences[run.start : run.stop], first[run.start : run.stop]
            if run.shared and self._shareable:
                yield from self._shared(some, starts)
            else:
                for states in self._side_by_side(some, starts):
                    yield states, [slice(None)]

    def _shared(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, list[Any]]]:
        import torch

        for found in compute(self._model, sequences, first, _TOKENS_PER_STEP[self._device.type]):
            if not found.ended:
                continue
            # Once for each row, however many sequences have it.
            rows = torch.unique(torch.cat([own for _, own in found.ended]))  # ascending
            where = [torch.searchsorted(rows, own) for _, own in found.ended]
            yield found.states[rows.to(self._device)], where

    def _side_by_side(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        import torch

        together = 0 if self._scaled else _TOKENS_PER_BATCH[self._device.type]
        if self._batch > 1:
            together = self._batch * max(together, self._context)
        for batch in _batches(sequences, together):
            longest = max(len(sequences[i]) for i in batch)
            # Padded on the right: causal attention never looks there, so no mask is needed.
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
            with torch.inference_mode():
                states = self._body(ids.to(self._device)).float()
            for row, i in enumerate(batch):
                yield states[row, first[i] : len(sequences[i])]

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        check_context("transformers", sequences, self._context, self._source.path)
        largest = max((max(sequence) for sequence in sequences), default=0)
        if largest >= len(self._output):
            raise EngineError(
                f"transformers: token {largest} in a vocabulary of "
                f"{len(self._output)} ({self._source.path})"
            )

    def _body(self, ids: torch.Tensor) -> torch.Tensor:
        found = self._model.base_model(input_ids=ids, use_cache=False)
        states: torch.Tensor = found.last_hidden_state
        return states

    def _check_output_layer(self) -> None:
        """Refuse a model whose logits are more than hidden states times a matrix.

        Some architectures add a bias, scale the logits or cap them (Gemma 2); then the product
        with the output layer, here and from stored hidden states, would be something else.
        """
        import torch

        with torch.inference_mode():
            ids = torch.arange(4, device=self._device)[None]
            wanted = self._model(input_ids=ids, use_cache=False).logits.float()
            found = self._body(ids).float() @ self._output.T
        near = 1e-3 if self._model.dtype == torch.float32 else 5e-2
        if not torch.allclose(found, wanted, rtol=near, atol=near, equal_nan=True):
            raise IncompatibleVariant(
                f"transformers: {type(self._model).__name__} does more to its logits than a matrix "
                f"product, which quantkit does not measure ({self._source.path})"
            )


def _batches(sequences: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    """Indices of neighbours that fit in ``tokens`` once padded: callers sort by length."""
    batch: list[int] = []
    longest = 0
    for i, sequence in enumerate(sequences):
        longest = max(longest, len(sequence))
        if batch and longest * (len(batch) + 1) > tokens:
            yield batch
            batch, longest = [], len(sequence)
        batch.append(i)
    if batch:
        yield batch
