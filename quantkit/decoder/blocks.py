"""Stream a checkpoint's decoder blocks: one in memory at a time, with the activations it sees."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from quantkit.decoder import experts
from quantkit.decoder import structure as asking
from quantkit.decoder.activations import Activations, varying_of
from quantkit.decoder.turned import TurnedLinear, turn
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
from quantkit.models.text_part import is_part, text_config
from quantkit.models.unstacked import unstacked
from quantkit.system.stopwatch import stage

_BATCH_TOKENS = 4096
_MOST_EXTRAS = 3
_LARGE_TABLE = 1 << 20
"""Weights of an embedding that is not filled to ask what a model does with it."""


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
        self.source = checkpoint
        self.device = torch.device(device)
        self.precision = precision
        self.wide = torch.float64 if precision == torch.float64 else torch.float32
        model = self._model = _skeleton(checkpoint)
        checkpoint = self.checkpoint = unstacked(checkpoint, model)
        self._config = model.config
        self._decoder = model.base_model
        name, self._blocks = _list_of_blocks(checkpoint, self._decoder)
        self._base = "" if model.base_model is model else f"{model.base_model_prefix}."
        self._stored = StoredNames.of(model, checkpoint.tensors)
        self.place = f"{self._base}{name}."
        """What precedes the numbers of blocks in the names of the model's modules."""
        if self._stored.converted:
            raise ConversionError(
                f"{checkpoint.id}: transformers converts {self._stored.converted[0]} of "
                f"{checkpoint.architecture} when it loads it, and quantkit does not; use gguf"
            )
        slots = {self._stored(n): t for n, t in model.state_dict().items()}
        shapes = {name: tuple(slot.shape) for name, slot in slots.items()}
        tied = set(map(self._stored, model.all_tied_weights_keys)) - checkpoint.tensors.keys()
        plain = [n for n, slot in slots.items() if slot.is_floating_point() and n not in tied]
        checkpoint.check_shapes({name: shapes[name] for name in plain})
        self.beside = self._stored.beside(checkpoint.tensors)
        """Tensors of what sees or hears, beside the language model."""
        unused = checkpoint.tensors.keys() - shapes.keys() - set(self.beside)
        self.ignored: list[str] = [n for n in checkpoint.tensors if n in unused]
        """Tensors of the checkpoint that transformers knows to leave out, and biases of zeros."""
        for name in self.ignored:
            of_zeros = name.endswith(".bias") and not checkpoint.read(name).any()
            if not of_zeros and not is_ignored(model, name):
                raise CheckpointError(
                    f"{checkpoint.path}: {name} {list(checkpoint.tensors[name].shape)}: "
                    f"{type(model).__name__} of its config.json has no such tensor"
                )
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        self._structures = _structures(self.source)
        self._extras: int | None = None
        self._varies: set[int] = set()
        self._batched: set[str] = set()
        """What the model passes to blocks once for each window, alike."""

    def __len__(self) -> int:
        return len(self._blocks)

    def prefix(self, index: int) -> str:
        """What precedes the names of block ``index``'s tensors: ``model.layers.3.``, also where
        the checkpoint calls them otherwise."""
        return self._stored(f"{self.place}{index}.")

    def stored(self, index: int) -> dict[str, str]:
        """The checkpoint's names of block ``index``'s tensors, by their names inside the block."""
        names = self._blocks[index].state_dict()
        return {name: self._stored(f"{self.place}{index}.{name}") for name in names}

    def linears(self, index: int) -> dict[str, str]:
        """By the names of block ``index``'s linears, relative to it (``self_attn.q_proj``), the
        checkpoint's names: of those that the block calls, not of matrices that it only reads."""
        stored = self.stored(index)
        called = set(self.structure(index).calls)
        return {
            name: stored[f"{name}.weight"].removesuffix(".weight")
            for name, module in self._blocks[index].named_modules()
            if isinstance(module, nn.Linear) and name in called
        }

    def turned(self, index: int) -> set[str]:
        """The checkpoint's names of block ``index``'s matrices that it stores as (in, out)."""
        stored = self.stored(index)
        return {
            stored[f"{name}.weight"]
            for name, module in self._blocks[index].named_modules()
            if isinstance(module, TurnedLinear)
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
                recorder = self._outline()[index]
                found = asking.ask(
                    copy.deepcopy(block).double(), recorder.hidden.shape[2:], recorder.arguments
                )
                self._structures[kind] = found
        return self._structures[kind]

    def tensors_outside(self) -> Iterator[str]:
        """Names of the tensors that belong to no block: embeddings, final norm, output layer."""
        inside = {name for index in range(len(self)) for name in self.stored(index).values()}
        inside |= set(self.ignored)
        return (name for name in self.checkpoint.tensors if name not in inside)

    def embed(self, ids: torch.Tensor) -> Activations:
        """Activations before the first block, of ``ids`` (samples, T), in batches of bounded size.

        Also notes what the model passes to each block besides them (rotary embeddings, masks).
        """
        decoder, recorders = self._without_blocks(self._decoder, self._base)
        batch = max(1, _BATCH_TOKENS // ids.shape[1])
        with torch.no_grad():
            decoder(input_ids=ids[:1], use_cache=False)
            first = [recorder.arguments for recorder in recorders]
            self._arguments[ids.shape[1]] = [_to(one, self.device) for one in first]
            shape = (*ids.shape, *recorders[0].hidden.shape[2:])
            hidden = Activations(shape, batch=batch, device=self.device)
            given: list[list[dict[str, Any]]] = [[] for _ in recorders]
            for index, part in enumerate(torch.split(ids, batch)):
                decoder(input_ids=part, use_cache=False)
                hidden.replace(index, recorders[0].hidden)
                for number, recorder in enumerate(recorders):
                    given[number].append(recorder.arguments)
                    self._batched |= _of_batch(first[number], recorder.arguments, len(part))
        hidden.varying = [_varying(*pair, len(ids)) for pair in zip(first, given, strict=True)]
        self._varies |= {index for index, one in enumerate(hidden.varying) if one}
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
            name: _widened(self.checkpoint.read(self._stored(prefix + name)), torch.float32)
            for name in decoder.state_dict()
            if name not in tied
        }
        # As engines do that ask config.json alone, whatever is stored.
        state |= {target: state[source] for target, source in tied.items()}
        decoder.load_state_dict(state, assign=True)
        return decoder.eval(), recorders

    def _recording(self, part: Any, extras: int | None = None) -> tuple[Any, list[_Recorder]]:
        """The model, or the decoder in it, without weights, and what stands in it for blocks."""
        if extras is None:
            if self._extras is None:
                self._outline()
            extras = self._extras or 0
        recorders = [_Recorder(block, extras) for block in self._blocks]
        # The copy takes these for copies of the blocks.
        decoder = copy.deepcopy(part, {id(self._blocks): nn.ModuleList(recorders)})
        return decoder, recorders

    def _outline(self) -> list[_Recorder]:
        """What stands in for the blocks, after the model passed them random activations.

        A block returns its activations alone, or first of several: what the model can go on with
        is found by trying.
        """
        failure: Exception | None = None
        for extras in range(_MOST_EXTRAS + 1) if self._extras is None else (self._extras,):
            decoder, recorders = self._recording(self._decoder, extras)
            tables = [m for m in decoder.modules() if self._is_table(m)]
            asking.fill(decoder, but=tables)
            for table in tables:
                table.forward = partial(_no_rows, table)
            ids = torch.zeros(1, asking.TOKENS, dtype=torch.long)
            try:
                with torch.no_grad():
                    decoder.eval()(input_ids=ids, use_cache=False)
                for one in recorders:
                    if one.hidden.shape != recorders[0].hidden.shape or one.hidden.dim() < 3:
                        raise TypeError(f"block given {list(one.hidden.shape)}")
            except Exception as error:
                failure = failure or error
                continue
            self._extras = extras
            return recorders
        assert failure is not None
        raise failure

    def _is_table(self, module: nn.Module) -> bool:
        """Whether a module holds a row for each token, or more than one would fill to ask."""
        return isinstance(module, nn.Embedding) and (
            module.num_embeddings >= self._config.get_text_config().vocab_size
            or module.weight.numel() > _LARGE_TABLE
        )

    def load(self, index: int) -> nn.Module:
        """Block ``index`` on the device, its weights in float32 or, for that precision, float64."""
        block: nn.Module = copy.deepcopy(self._blocks[index])
        state = {
            # Moved as it is stored and widened there: half of the bytes go over the bus.
            name: _widened(self.checkpoint.read(stored).to(self.device), self.wide)
            for name, stored in self.stored(index).items()
        }
        block.load_state_dict(state, assign=True)
        for part in block.modules():
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(self.device))
        return block.eval().requires_grad_(False)

    def arguments(self, index: int, length: int) -> dict[str, Any]:
        """What the model passes to block ``index`` besides activations of ``length`` tokens, as
        many as windows had that were embedded."""
        return dict(self._arguments[length][index])

    def run(self, index: int, block: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """The block's output for one batch of activations, both (B, T, hidden) float32 on the
        device."""
        with stage("forward"), torch.no_grad():
            return self.compute(index, block, batch)

    def compute(self, index: int, block: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """As ``run``, with gradients where they are enabled."""
        arguments = self.arguments(index, batch.shape[1])
        for name in self._batched.intersection(arguments):
            value = arguments[name]
            if isinstance(value, torch.Tensor) and len(value) == 1:
                arguments[name] = value.expand(len(batch), *value.shape[1:])
        varying = varying_of(batch, index)
        if varying is None and index in self._varies:
            raise ConversionError(f"{self.prefix(index)}: what it is given besides is not known")
        with self.autocast():
            output = block(batch.to(self.wide), **arguments | (varying or {}))
            hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
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
    or the ``output`` that it is given; as first of a tuple where blocks return ``extras``, less
    one, besides."""

    def __init__(self, block: nn.Module, extras: int) -> None:
        super().__init__()
        self._names = list(inspect.signature(type(block).forward).parameters)[1:]
        self._extras = extras
        self._of = (block,)  # no module of this one
        self.hidden = torch.empty(0)
        self.output: torch.Tensor | None = None
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        # What the model reads of a block besides: its kind of attention.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_of"][0], name)

    def forward(self, *unnamed: Any, **named: Any) -> Any:
        given = dict(zip(self._names, unnamed, strict=False)) | named
        self.hidden = given.pop(self._names[0])
        self.arguments = given
        output = self.hidden if self.output is None else self.output
        return (output, *(None,) * (self._extras - 1)) if self._extras else output


def _no_rows(table: nn.Module, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    width = table.get_parameter("weight").shape[1]
    return torch.zeros(*ids.shape, width, dtype=torch.float64)


def _varying(first: dict[str, Any], given: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """Of what the model passed to a block with each batch, all that is not as with the ``first``
    window alone: (count, n, …)."""
    found = {}
    for name, value in first.items():
        if all(_alike(value, one[name]) for one in given):
            continue
        values = [one[name] for one in given]
        if not all(isinstance(one, torch.Tensor) for one in values):
            raise ConversionError(f"{name}, which blocks are given, depends on the text")
        joined = torch.cat(values)
        if len(joined) % count:
            raise ConversionError(f"{name}, which blocks are given, depends on the text")
        found[name] = joined.view(count, -1, *joined.shape[1:])
    return found


def _of_batch(first: dict[str, Any], given: dict[str, Any], count: int) -> set[str]:
    """Of what goes with a batch of ``count``, the tensors that have a part for each window."""
    tensors = {name: one for name, one in given.items() if isinstance(one, torch.Tensor)}
    return {
        name
        for name, one in tensors.items()
        if one.dim() and count > 1 and len(one) == count and len(first[name]) == 1
    }


def _alike(first: Any, other: Any) -> bool:
    """Whether what goes with a batch is what goes with its first window."""
    if isinstance(first, torch.Tensor):
        if not isinstance(other, torch.Tensor) or first.dim() != other.dim():
            return False
        if first.shape != other.shape and first.shape[:1] != (1,):
            return False
        return first.shape[1:] == other.shape[1:] and torch.equal(first.expand_as(other), other)
    if isinstance(first, tuple | list):
        return len(first) == len(other) and all(map(_alike, first, other))
    if isinstance(first, dict):
        return first.keys() == other.keys() and all(_alike(v, other[k]) for k, v in first.items())
    return True


@lru_cache(maxsize=1)
def _structures(_checkpoint: Checkpoint) -> dict[Any, asking.Structure]:
    """What was found, by kind of block; shared by all variants of a source."""
    return {}


def _skeleton(checkpoint: Checkpoint) -> Any:
    """The model as transformers builds it from the configuration, without any weights, and with
    its experts apart."""
    config = text_config(checkpoint)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if is_part(checkpoint) and not known:
        raise ConversionError(
            f"{checkpoint.id}: transformers has no causal language model for {config.model_type}, "
            "the text_config of its config.json, so quantkit cannot read its blocks"
        )
    name = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__ if known else "none"
    if name != checkpoint.architecture and not is_part(checkpoint):
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
        turn(model)
    _compute_buffers(model)
    return model


def _compute_buffers(model: Any) -> None:
    """Built on no device, they never were: rotary frequencies, embedding scales."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))
    with torch.no_grad():
        model.base_model.apply(model.base_model._init_weights)


def _list_of_blocks(checkpoint: Checkpoint, decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name in the decoder of the list that holds most of it, and the list."""
    lists = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    sizes = {n: sum(one.numel() for one in m.parameters()) for n, m in lists.items()}
    if not any(sizes.values()):
        raise ConversionError(
            f"{checkpoint.id}: {checkpoint.architecture} has no list of decoder blocks, so "
            "quantkit cannot read it block by block; use gguf"
        )
    name = max(sizes, key=lambda one: sizes[one])  # of several as large, the outer one
    return name, lists[name]


def _widened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Tables of whole numbers stay as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(part, device) for part in value)
    if isinstance(value, dict):
        return {key: _to(part, device) for key, part in value.items()}
    return value
