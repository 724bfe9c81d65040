"""transformers: the reference engine. Quantized checkpoints are scored by unpacking their weights.

Exact on any device and without kernels: what differs from the source is what quantization did.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import FORMAT, Checkpoint
from quantkit.engines.base import Capabilities, Scorer, ServeOptions, ServerCommand, check_format
from quantkit.errors import CheckpointError, EngineError, IncompatibleVariant, ToolchainError
from quantkit.variant import Model

if TYPE_CHECKING:
    import torch

_TOKENS_PER_BATCH = {"cpu": 512, "cuda": 8192}
"""What keeps the device busy; on a CPU more than a few hundred rows only leave its cache."""


class Transformers:
    """Runs safetensors, GPTQ and AWQ in this process; does not serve."""

    name = "transformers"
    capabilities = Capabilities(
        formats=frozenset({FORMAT, "gptq", "awq"}),
        logits="full",
        serves=False,
        devices=("cpu", "cuda"),
    )

    def version(self) -> str | None:
        """The installed version, or None."""
        try:
            return importlib.metadata.version("transformers")
        except importlib.metadata.PackageNotFoundError:
            return None

    def check(self, model: Model) -> None:
        """Raise IncompatibleVariant for a format that is not read here."""
        if self.version() is None:
            raise ToolchainError("transformers is not installed; run: pip install quantkit")
        check_format(self, model)

    def scorer(self, model: Model, context: int) -> TransformersScorer:
        """Load ``model``; ``context`` costs nothing here."""
        self.check(model)
        return TransformersScorer(model, context)

    def server(self, model: Model, options: ServeOptions) -> ServerCommand:  # noqa: ARG002
        """Raise IncompatibleVariant: this engine does not serve."""
        raise IncompatibleVariant(
            f"transformers does not serve ({model.path}); vllm does (`quantkit engines list`)"
        )


class TransformersScorer(Scorer):
    """A model in float32 on the CPU, in bfloat16 on a GPU that has it, loaded within ``with``."""

    def __init__(self, model: Model, context: int) -> None:
        self._source = model
        self._context = context

    def __enter__(self) -> TransformersScorer:
        import torch

        cuda = torch.cuda.is_available()
        self._device = torch.device("cuda" if cuda else "cpu")
        dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
        self._model = _load(self._source, dtype).to(self._device)
        output: torch.Tensor = self._model.get_output_embeddings().weight
        self._output = output.detach().float()
        self._check_output_layer()
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
        for hidden in self._hidden(sequences, first):
            yield (hidden @ self._output.T).cpu()

    def hidden_states(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        """What the output layer is given: ``(len - first, hidden) float32``, on the CPU."""
        for hidden in self._hidden(sequences, first):
            yield hidden.cpu()

    def _hidden(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        import torch

        for batch in _batches(sequences, _TOKENS_PER_BATCH[self._device.type]):
            longest = max(len(sequences[i]) for i in batch)
            if longest > self._context:
                raise EngineError(
                    f"transformers: a sequence has {longest} tokens, the scorer was opened "
                    f"for {self._context} ({self._source.path})"
                )
            # Padded on the right: causal attention never looks there, so no mask is needed.
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
            if ids.max() >= len(self._output):
                raise EngineError(
                    f"transformers: token {int(ids.max())} in a vocabulary of "
                    f"{len(self._output)} ({self._source.path})"
                )
            with torch.inference_mode():
                states = self._body(ids.to(self._device)).float()
            for row, i in enumerate(batch):
                yield states[row, first[i] : len(sequences[i])]

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


def _load(source: Model, dtype: torch.dtype) -> Any:
    """Build the model that config.json describes and fill in its weights, one at a time."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(
                _config(source), trust_remote_code=False, attn_implementation="sdpa", dtype=dtype
            )
    except ValueError as error:  # an architecture that transformers does not have
        raise IncompatibleVariant(f"{source.path}: {str(error).splitlines()[0]}") from error
    model.tie_weights()
    slots: dict[str, torch.Tensor] = model.state_dict()
    filled = set()
    for name, tensor in _weights(source):
        if name.endswith("rotary_emb.inv_freq"):
            continue  # old checkpoints store what follows from the config
        slot = slots.get(name)
        if slot is None or slot.shape != tensor.shape:
            wanted = "no such tensor" if slot is None else f"the shape {list(slot.shape)}"
            raise CheckpointError(
                f"{source.path}: {name} {list(tensor.shape)}: {type(model).__name__} of its "
                f"config.json has {wanted}"
            )
        slot.copy_(tensor)
        filled.add(slot.data_ptr())
    # Tied weights share their memory: one of the names suffices.
    missing = [name for name, slot in slots.items() if slot.data_ptr() not in filled]
    if missing:
        raise CheckpointError(
            f"{source.path}: {len(missing)} tensors that config.json asks for are missing, "
            f"for example {missing[0]}"
        )
    return model.eval().requires_grad_(False)


def _config(source: Model) -> Any:
    """The model's config, as of a model that is not quantized."""
    if isinstance(source, Checkpoint):
        return copy.deepcopy(source.hf_config)
    config = Checkpoint.open(source.path).hf_config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _weights(source: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its plain name, dequantized where it is not plain."""
    if isinstance(source, Checkpoint):
        return ((name, source.read(name)) for name in source.tensors)
    return _dequantized(source.format, source.path)


def _dequantized(format_: str, directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    module = importlib.import_module(f"quantkit.formats.{format_}")
    tensors: Iterator[tuple[str, torch.Tensor]] = module.dequantize(directory)
    return tensors
