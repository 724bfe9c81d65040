"""Several prompts answered side by side in llama.cpp: ``quantkit.engines.greedy.Session``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantkit.engines.llamacpp.context import UBATCH, Context, Token
from quantkit.engines.prefixes import common

if TYPE_CHECKING:
    import torch


class Session:
    """Each prompt is a sequence of the context. Where ``share``, one begins with the cells of what
    it has in common with the prompt before it."""

    def __init__(self, context: Context, *, share: bool) -> None:
        self._context = context
        self._share = share

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read the prompts; the logits that follow each, ``(prompts, vocabulary)``."""
        import torch

        self._context.clear()
        self._lengths = [len(prompt) for prompt in prompts]
        self._writing = set(range(len(prompts)))
        last = []
        before: Sequence[int] = ()
        for i, prompt in enumerate(prompts):
            beginning = min(common(before, prompt), len(prompt) - 1) if self._share else 0
            if beginning:
                self._context.copy(i - 1, i, beginning)
            tokens = [
                Token(prompt[at], at, [i], at == len(prompt) - 1)
                for at in range(beginning, len(prompt))
            ]
            for start in range(0, len(tokens), UBATCH):
                logits = self._context.decode(tokens[start : start + UBATCH])
            last.append(logits)
            before = prompt
        return torch.cat(last)

    def step(self, prompts: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Add one token to each of these prompts and forget the others."""
        for i in self._writing - set(prompts):
            self._context.remove(i)
        self._writing = set(prompts)
        logits = self._context.decode(
            Token(token, self._lengths[i], [i], output=True)
            for i, token in zip(prompts, tokens, strict=True)
        )
        for i in prompts:
            self._lengths[i] += 1
        return logits
