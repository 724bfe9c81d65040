"""Stream a checkpoint's decoder blocks: one in memory at a time, with the activations it sees."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from quantkit.decoder import experts
from quantkit.decoder import structure as asking
from quantkit.decoder.activations import Activations
from quantkit.errors import (
    CheckpointError,
    ConversionError,
    QuantkitError,
    first_line,
    reading,
)
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.hf_config import attention
from quantkit.models.stored_names import StoredNames, is_ignored
from quantkit.system.stopwatch import stage

_BATCH_TOKENS = 4096


class DecoderBlocks:
    """The decoder of a checkpoint as a sequence of blocks that are loaded one by one.

    Raise ConversionError where transformers has no causal language model of that name, or none
    that has a list of blocks. ``decoder/proof.py`` says whether these compute what it does.

    Blocks compute in ``precision``; where that is bfloat16, only matrix products do (autocast), and
    all else in float32. The activations between blocks are float32.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.precision = precision
        self.wide = torch.float64 if precision == torch.float64 else torch.float32
        model = self._model = _skeleton(checkpoint)
        self._config = model.config
        self._decoder = model.base_model
        name, self._blocks = _list_of_blocks(checkpoint, self._decoder)
        self._base = f"{model.base_model_prefix}."
        self._stored = StoredNames.of(model, checkpoint.tensors)
        self._place = f"{self._base}{name}."
        shapes = {self._stored(n): tuple(t.shape) for n, t in model.state_dict().items()}
        tied = set(map(self._stored, model.all_tied_weights_keys)) - checkpoint.tensors.keys()
        checkpoint.check_shapes({n: shape for n, shape in shapes.items() if n not in tied})
        self.ignored: list[str] = [n for n in checkpoint.tensors if n not in shapes]
        """Tensors of the checkpoint that transformers knows to leave out, and biases of zeros."""
        for name in self.ignored:
            of_zeros = name.endswith(".bias") and not checkpoint.read(name).any()
            if not of_zeros and not is_ignored(model, name):
                raise CheckpointError(
                    f"{checkpoint.path}: {name} {list(checkpoint.tensors[name].shape)}: "
                    f"{type(model).__name__} of its config.json has no such tensor"
                )
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        self._structures = _structures(checkpoint)

    def __len__(self) -> int:
        return len(self._blocks)

    def prefix(self, index: int) -> str:
        """What precedes the names of block ``index``'s tensors: ``model.layers.3.``."""
        return self._stored(f"{self._place}{index}.")

    def stored(self, index: int) -> dict[str, str]:
        """The checkpoint's names of block ``index``'s tensors, by their names inside the block."""
        names = self._blocks[index].state_dict()
        return {name: self._stored(f"{self._place}{index}.{name}") for name in names}

    def linears(self, index: int) -> dict[str, str]:
        """By the names of block ``index``'s linears, relative to it (``self_attn.q_proj``), the
        checkpoint's names."""
        stored = self.stored(index)
        return {
            name: stored[f"{name}.weight"].removesuffix(".weight")
            for name, module in self._blocks[index].named_modules()
            if isinstance(module, nn.Linear)
        }

    def structure(self, index: int) -> asking.Structure:
        """What block ``index`` is made of; asked once for each kind of block, without its
        weights."""
        block = self._blocks[index]
        kind = (
            tuple((name, type(module)) for name, module in block.named_modules()),
            tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items()),
        )
        if kind not in self._structures:
            with self.running_apart():
                arguments = self._outline()[index]
                width = self._config.hidden_size
                self._structures[kind] = asking.ask(copy.deepcopy(block), width, arguments)
        return self._structures[kind]

    def tensors_outside(self) -> Iterator[str]:
        """Names of the tensors that belong to no block: embeddings, final norm, output layer."""
        inside = tuple(self.prefix(index) for index in range(len(self)))
        return (
            name
            for name in self.checkpoint.tensors
            if not name.startswith(inside) and name not in self.ignored
        )

    def embed(self, ids: torch.Tensor) -> Activations:
        """Activations before the first block, of ``ids`` (samples, T), in batches of bounded size.

        Also notes what the model passes to each block besides them (rotary embeddings, masks).
        """
        decoder, recorders = self._without_blocks(self._decoder, self._base)
        batch = max(1, _BATCH_TOKENS // ids.shape[1])
        shape = (*ids.shape, self._config.hidden_size)
        hidden = Activations(shape, batch=batch, device=self.device)
        with torch.no_grad():
            decoder(input_ids=ids[:1], use_cache=False)
            self._arguments[ids.shape[1]] = [
                _to(recorder.arguments, self.device) for recorder in recorders
            ]
            for index, part in enumerate(torch.split(ids, batch)):
                decoder(input_ids=part, use_cache=False)
                hidden.replace(index, recorders[0].hidden)
        return hidden

    def head(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """What turns ids (samples, T) and the outputs of the last block for them into logits
        (samples, T, vocabulary): final norm, output layer and what may follow, on the CPU."""
        model, recorders = self._without_blocks(self._model, "")

        def logits(ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
            recorders[-1].output = last
            with torch.no_grad():
                found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
            return found

        return logits

    @contextmanager
    def running_apart(self) -> Iterator[None]:
        """Turn what a block raises that is run without the model into a ConversionError."""
        try:
            yield
        except (QuantkitError, OSError, MemoryError):
            raise
        except Exception as error:
            raise ConversionError(
                f"{self.checkpoint.id}: the blocks of {self.checkpoint.architecture} cannot be run "
                f"one by one: {type(error).__name__}: {first_line(error)}"
            ) from error

    def _without_blocks(self, part: Any, prefix: str) -> tuple[Any, list[_Recorder]]:
        """The model, or the decoder in it whose names begin with ``prefix``, in float32 on the CPU,
        and what stands in it for the blocks."""
        decoder, recorders = self._recording(part)
        tied = self._model.all_tied_weights_keys if part is self._model else {}
        state = {
            name: self.checkpoint.read(self._stored(prefix + name)).float()
            for name in decoder.state_dict()
            if name not in tied
        }
        # As engines do that ask config.json alone, whatever is stored.
        state |= {target: state[source] for target, source in tied.items()}
        decoder.load_state_dict(state, assign=True)
        return decoder.eval(), recorders

    def _recording(self, part: Any) -> tuple[Any, list[_Recorder]]:
        """The model, or the decoder in it, without weights, and what stands in it for blocks."""
        recorders = [_Recorder(block) for block in self._blocks]
        # The copy takes these for copies of the blocks.
        decoder = copy.deepcopy(part, {id(self._blocks): nn.ModuleList(recorders)})
        # Built on no device, buffers were never computed: rotary frequencies, embedding scales.
        for module in decoder.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
        decoder.apply(decoder._init_weights)
        return decoder, recorders

    def _outline(self) -> list[dict[str, Any]]:
        """What the model passes to each block besides activations, of random ones."""
        decoder, recorders = self._recording(self._decoder)
        embedding = decoder.get_input_embeddings()
        asking.fill(decoder, but=embedding)
        ids = torch.zeros(1, asking.TOKENS, dtype=torch.long)
        hidden = torch.zeros(*ids.shape, self._config.hidden_size, dtype=torch.float64)
        embedding.forward = lambda _: hidden
        with torch.no_grad():
            decoder.eval()(input_ids=ids, use_cache=False)
        return [recorder.arguments for recorder in recorders]

    def load(self, index: int) -> nn.Module:
        """Block ``index`` on the device, its weights in float32 or, for that precision, float64."""
        block: nn.Module = copy.deepcopy(self._blocks[index])
        state = {
            # Moved as it is stored and widened there: half of the bytes go over the bus.
            name: self.checkpoint.read(stored).to(self.device).to(self.wide)
            for name, stored in self.stored(index).items()
        }
        block.load_state_dict(state, assign=True)
        return block.eval().requires_grad_(False)

    def arguments(self, index: int, length: int) -> dict[str, Any]:
        """What the model passes to block ``index`` besides activations of ``length`` tokens, as
        many as windows had that were embedded."""
        return self._arguments[length][index]

    def run(self, index: int, block: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """The block's output for one batch of activations, both (B, T, hidden) float32 on the
        device."""
        with stage("forward"), torch.no_grad():
            return self.compute(index, block, batch)

    def compute(self, index: int, block: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """As ``run``, with gradients where they are enabled."""
        with self.autocast():
            output = block(batch.to(self.wide), **self.arguments(index, batch.shape[1]))
            hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
            return hidden.float()

    def advance(self, index: int, block: nn.Module, hidden: Activations) -> None:
        """Turn the inputs of block ``index`` into its outputs, in their place."""
        for number, batch in enumerate(hidden):
            hidden.replace(number, self.run(index, block, batch))

    def autocast(self) -> torch.autocast:
        """The precision of matrix products."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16
        )


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with, and returns the activations as they are
    or the ``output`` that it is given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._names = list(inspect.signature(type(block).forward).parameters)[2:]
        self.hidden = torch.empty(0)
        self.output: torch.Tensor | None = None
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: torch.Tensor, *unnamed: Any, **named: Any) -> torch.Tensor:
        self.hidden = hidden
        self.arguments = dict(zip(self._names, unnamed, strict=False)) | named
        return hidden if self.output is None else self.output


@lru_cache(maxsize=1)
def _structures(_checkpoint: Checkpoint) -> dict[Any, asking.Structure]:
    """What was found, by kind of block; shared by all variants of a source."""
    return {}


def _skeleton(checkpoint: Checkpoint) -> Any:
    """The model as transformers builds it from the configuration, without any weights, and with
    its experts apart."""
    config = checkpoint.hf_config
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    name = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__ if known else "none"
    if name != checkpoint.architecture:
        raise ConversionError(
            f"{checkpoint.id} is a {checkpoint.architecture}; quantkit reads the blocks of "
            f"language models only; for this config.json transformers has {name}"
        )
    with reading(checkpoint.path / "config.json"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=attention(config),
            trust_remote_code=False,
        )
        experts.separate(model)
    return model


def _list_of_blocks(checkpoint: Checkpoint, decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """Its name in the decoder, and the list."""
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList):
            return name, child
    raise ConversionError(
        f"{checkpoint.id}: {checkpoint.architecture} has no list of decoder blocks at its top, so "
        "quantkit cannot read it block by block; use gguf"
    )


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(part, device) for part in value)
    if isinstance(value, dict):
        return {key: _to(part, device) for key, part in value.items()}
    return value
