"""Perplexity with llama.cpp's protocol, so that the tables people know compare.

The text is one stream of tokens, cut into windows that do not overlap; where the model begins
texts with BOS, a window's first token is replaced by it. The second half of a window is scored,
so that every scored token has at least half a window of context
(llama.cpp, tools/perplexity/perplexity.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from quantkit.data.calibration import hash_ids
from quantkit.errors import EvaluationError


@dataclass(frozen=True)
class Windows:
    """A text cut for scoring: what every model is given, and where it is scored.

    Models read whole windows, although the last token predicts nothing: llama.cpp computes rows
    in blocks, and a block that is not full otherwise, by 0.02 % of a Q4_K_M's perplexity.
    """

    ids: tuple[tuple[int, ...], ...]
    context: int
    """Tokens per window."""
    bos_id: int | None
    """What replaced the first id of each window; None where nothing did."""

    @property
    def first(self) -> int:
        """The first scored position: it predicts the token after it."""
        return self.context // 2

    @property
    def scored(self) -> int:
        """Scored positions per window: the last token has none to predict."""
        return self.context - 1 - self.first

    def targets(self, window: int) -> torch.Tensor:
        """The ids to predict, ``(scored,) int64``."""
        return torch.tensor(self.ids[window][self.first + 1 :])

    @cached_property
    def sha256(self) -> str:
        """Digest of the windows' ids, as little-endian int32."""
        return hash_ids([i for window in self.ids for i in window])

    def protocol(self) -> dict[str, Any]:
        """What two numbers must have in common to be compared."""
        return {
            "context": self.context,
            "stride": self.context,
            "bos": self.bos_id,
            "windows": len(self.ids),
            "scored_positions": f"{self.first}..{self.context - 2} of each window",
            "text_sha256": self.sha256,
        }


def windows(
    ids: Sequence[int],
    context: int = 512,
    bos_id: int | None = None,
    limit: int | None = None,
    name: str = "the evaluation text",
) -> Windows:
    """Cut ``ids`` into windows of ``context`` tokens; what is left over at the end is not used.

    ``limit``: most windows. Raise EvaluationError where the text fills none.
    """
    if context < 4:
        raise EvaluationError(f"context {context}: expected at least 4 tokens per window")
    count = len(ids) // context
    if count == 0:
        raise EvaluationError(
            f"{name} has {len(ids)} tokens, expected at least one window of "
            f"{context}; give a longer text or a smaller context"
        )
    if limit is not None:
        count = min(count, limit)
    head = () if bos_id is None else (bos_id,)
    starts = range(0, count * context, context)
    cut = tuple((*head, *ids[start + len(head) : start + context]) for start in starts)
    return Windows(cut, context, bos_id)
