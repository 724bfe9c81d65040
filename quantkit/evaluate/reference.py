"""What variants are compared with: the source's final hidden states and its output layer.

Its logits would be large (37 GiB for a Llama 3 on WikiText-2). The hidden states of the scored
positions are a hundredth of that, and their product with the output layer gives the same logits
again, exactly but for float32 rounding.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit.checkpoint import Checkpoint
from quantkit.engines.base import label
from quantkit.errors import EvaluationError
from quantkit.evaluate.perplexity import Windows
from quantkit.files import sha256_json
from quantkit.progress import track

if TYPE_CHECKING:
    from quantkit.variant import Model

_VERSION = 1
"""Raised when what is stored changes: it is part of the key."""


@dataclass(frozen=True)
class Reference:
    """The source's next-token distributions at every scored position of ``windows``.

    ``hidden``: ``(windows, scored, hidden)``; ``output``: ``(vocabulary, hidden)``, both float32.
    ``source``: digest of the source's files; ``engine``: what computed it.
    """

    source: str
    engine: str
    windows: Windows
    hidden: torch.Tensor
    output: torch.Tensor

    @classmethod
    def build(cls, checkpoint: Checkpoint, windows: Windows, cache_dir: Path) -> Reference:
        """Run the source once; found again in ``cache_dir`` by the hash of all that it depends on.

        Raise EvaluationError where the source itself gives non-finite values.
        """
        from quantkit.engines import scoring_engine

        engine = scoring_engine(checkpoint)
        engine.check(checkpoint)
        name = label(engine)
        source = digest(checkpoint)
        key = sha256_json([_VERSION, source, name, windows.protocol()])
        path = cache_dir / f"reference-{key[:16]}.safetensors"
        if not path.is_file():
            _compute(checkpoint, windows, path)
        with safe_open(path, framework="pt") as file:
            hidden, output = file.get_tensor("hidden"), file.get_tensor("output").float()
        return cls(source, name, windows, hidden, output)

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer: the tokenizer's size, often padded."""
        return self.output.shape[0]

    def is_of(self, model: Model) -> bool:
        """Whether ``model`` is the source that this was computed from."""
        return isinstance(model, Checkpoint) and digest(model) == self.source

    def logits(self, window: int) -> torch.Tensor:
        """``(scored, vocabulary) float32`` of one window."""
        return self.hidden[window] @ self.output.T


def digest(checkpoint: Checkpoint) -> str:
    """One digest for all files of a checkpoint."""
    return sha256_json(checkpoint.sha256)


def _compute(checkpoint: Checkpoint, windows: Windows, path: Path) -> None:
    from quantkit.engines.transformers import TransformersScorer

    inputs = windows.inputs()
    with TransformersScorer(checkpoint, windows.context) as scorer:
        states = scorer.hidden_states(inputs, [windows.first] * len(inputs))
        hidden = torch.stack(list(track(states, "reference: windows", len(inputs))))
        output = scorer.output_weight
    bad = int((~hidden.isfinite().all(-1)).sum())
    if bad or not output.isfinite().all():
        raise EvaluationError(
            f"{checkpoint.path}: the reference itself is not finite ({bad} of "
            f"{hidden[..., 0].numel()} positions); nothing can be compared with it"
        )
    half = output.bfloat16()
    exact = half if torch.equal(half.float(), output) else output
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        save_file({"hidden": hidden, "output": exact.contiguous()}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
