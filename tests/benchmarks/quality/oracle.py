"""Drift in plain torch and transformers, without a line of quantkit's.

Windows do not overlap; the second half of each is scored, as llama.cpp does. Weights are float32,
and so are logits and probabilities, over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class InputRounding:
    """``linears``: whose inputs are rounded; ``arguments``: of compressed-tensors'
    QuantizationArgs. ``global_scales``: by linear, those that are stored."""

    linears: frozenset[str]
    arguments: dict[str, Any]
    global_scales: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """Of one text, each value the mean over the scored positions of one window."""

    kld: list[float]
    nll: list[float]
    reference_nll: list[float]
    top1: list[float]


class Oracle:
    """The source's log-probabilities, on disk, and what is measured against them.

    ``texts``: windows by kind, each (windows, length) int64.
    """

    def __init__(
        self, source: Path, texts: dict[str, torch.Tensor], device: torch.device, cache: Path
    ) -> None:
        self._source, self._texts, self._device, self._cache = source, texts, device, cache
        model = self._model(())
        for kind, windows in texts.items():
            for index, ids in enumerate(windows):
                torch.save(self._log_probabilities(model, ids).cpu(), self._file(kind, index))

    def score(
        self, state: Iterable[tuple[str, torch.Tensor]], inputs: InputRounding | None = None
    ) -> dict[str, Scores]:
        """By kind, of the source with the weights of ``state`` in the place of its own, and the
        ``inputs`` of linears rounded."""
        model = self._model(state)
        if inputs:
            round_inputs(model, inputs)
        return {kind: self._score(model, kind, windows) for kind, windows in self._texts.items()}

    def _score(self, model: Any, kind: str, windows: torch.Tensor) -> Scores:
        scores = Scores([], [], [], [])
        for index, ids in enumerate(windows):
            reference = torch.load(self._file(kind, index)).to(self._device)
            found = self._log_probabilities(model, ids)
            targets = ids[-len(found) :].to(self._device)
            scores.kld.append(divergence(reference, found).mean().item())
            scores.nll.append(-found.gather(1, targets[:, None]).mean().item())
            scores.reference_nll.append(-reference.gather(1, targets[:, None]).mean().item())
            scores.top1.append((found.argmax(1) == reference.argmax(1)).float().mean().item())
        return scores

    def _log_probabilities(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """Of every token of the second half but its first, given all before: (scored, V)."""
        half = len(ids) - len(ids) // 2
        with torch.no_grad():
            logits = model(ids[None].to(self._device), logits_to_keep=half, use_cache=False).logits[
                0, :-1
            ]
        return logits.float().log_softmax(1)

    def _model(self, state: Iterable[tuple[str, torch.Tensor]]) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self._source, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        replace_weights(model, state)
        return model.eval().to(self._device)

    def _file(self, kind: str, index: int) -> Path:
        return self._cache / f"{kind}-{index}.pt"


def round_inputs(model: Any, inputs: InputRounding) -> None:
    """Round the inputs of linears of the model as compressed-tensors does."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    arguments = QuantizationArgs(**inputs.arguments)

    def rounded(
        whole: torch.Tensor | None, module: Any, given: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        scale, zero = compute_dynamic_scales_and_zp(given[0], arguments, module, whole)
        return fake_quantize(given[0], scale, zero, arguments, whole), *given[1:]

    for name, module in model.named_modules():
        if name in inputs.linears:
            whole = inputs.global_scales.get(name)
            whole = None if whole is None else whole.to(module.weight.device)
            module.register_forward_pre_hook(partial(rounded, whole))


def divergence(reference: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """D(reference ‖ found) in nats of log-probabilities (..., V): (...)."""
    return (reference.exp() * (reference - found)).sum(-1)


def replace_weights(model: Any, state: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Put all of ``state`` into the model; raise ValueError where names or shapes are not its own.

    An empty state leaves it as it is. Some packages give every linear a bias, of zeros.
    """
    slots = model.state_dict()
    missing = set(slots)
    for name, tensor in state:
        if name not in slots and name.endswith(".bias") and not tensor.any():
            continue
        if name not in slots or slots[name].shape != tensor.shape:
            raise ValueError(f"{name} {list(tensor.shape)}: not a tensor of the source")
        slots[name].copy_(tensor)
        missing.discard(name)
    lacking = [name for name in missing if name.startswith("model.layers.")]
    if lacking and len(missing) < len(slots):
        raise ValueError(f"the weights lack {min(lacking)}")
