"""Several prompts answered side by side in transformers: ``quantkit.engines.greedy.Session``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantkit.engines.base import Scorer
from quantkit.engines.prefixes import common

if TYPE_CHECKING:
    import torch


class Cached:
    """Prompts padded on the left, with their keys and values.

    What all of them begin with is computed once where ``share``.
    """

    def __init__(self, model: Any, output: torch.Tensor, tokens: int, *, share: bool) -> None:
        self._model = model
        self._output = output
        self._tokens = tokens
        """How many are computed together."""
        self._share = share

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read the prompts; the logits that follow each, ``(prompts, vocabulary)``."""
        import torch
        from transformers.cache_utils import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        self._prompts = list(range(len(prompts)))
        beginning = 0
        if self._share and len(prompts) > 1:
            beginning = min(min(common(prompts[0], p), len(p) - 1) for p in prompts)
        if beginning:
            self._mask = torch.ones(1, 0, dtype=torch.long)
            self._read(torch.tensor([prompts[0][:beginning]]), torch.ones(1, beginning))
            self._cache.batch_repeat_interleave(len(prompts))
        width = max(map(len, prompts)) - beginning
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        real = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            rest = torch.tensor(prompt[beginning:])
            ids[row, -len(rest) :] = rest
            real[row, -len(rest) :] = 1
        self._mask = torch.ones(len(prompts), beginning, dtype=torch.long)
        return self._read(ids, real)

    def step(self, prompts: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Add one token to each of these prompts and forget the others."""
        import torch

        if len(prompts) < len(self._prompts):
            rows = torch.tensor([self._prompts.index(i) for i in prompts])
            self._cache.batch_select_indices(rows.to(self._model.device))
            self._mask = self._mask[rows]
            self._prompts = list(prompts)
        ids = torch.tensor(tokens)[:, None]
        return self._read(ids, torch.ones_like(ids))

    def _read(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Add columns of tokens; the logits after the last, on the CPU."""
        import torch

        columns = max(1, self._tokens // len(ids))
        for start in range(0, ids.shape[1], columns):
            some, of_them = ids[:, start : start + columns], real[:, start : start + columns]
            self._mask = torch.cat([self._mask, of_them.long()], 1)
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -some.shape[1] :]
            with torch.inference_mode():
                found = self._model.base_model(
                    input_ids=some.to(self._model.device),
                    attention_mask=self._mask.to(self._model.device),
                    position_ids=positions.to(self._model.device),
                    past_key_values=self._cache,
                    use_cache=True,
                )
                last = found.last_hidden_state[:, -1].float()
        logits: torch.Tensor = (last @ self._output.T).cpu()
        return logits


class Recomputed:
    """Everything again for each token: for models whose earlier keys change with the length."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read the prompts; the logits that follow each, ``(prompts, vocabulary)``."""
        self._written = [list(prompt) for prompt in prompts]
        return self._read(range(len(prompts)))

    def step(self, prompts: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Add one token to each of these prompts."""
        for i, token in zip(prompts, tokens, strict=True):
            self._written[i].append(token)
        return self._read(prompts)

    def _read(self, prompts: Sequence[int]) -> torch.Tensor:
        import torch

        texts = [self._written[i] for i in prompts]
        return torch.cat(list(self._scorer.logits(texts, [len(text) - 1 for text in texts])))
