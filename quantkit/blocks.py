"""Stream a checkpoint's decoder blocks: one in memory at a time, with the activations it sees."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantkit.checkpoint import Checkpoint
from quantkit.errors import ConversionError
from quantkit.quantize.activations import Activations
from quantkit.stopwatch import stage

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Olmo2ForCausalLM",
    "GraniteForCausalLM",
    "Phi3ForCausalLM",
    "StableLmForCausalLM",
)
"""Decoders of which one block after another computes what transformers' whole model does."""

_BATCH_TOKENS = 4096


class DecoderBlocks:
    """The decoder of a checkpoint as a sequence of blocks that are loaded one by one.

    Blocks compute in ``precision``; where that is bfloat16, only matrix products do (autocast), and
    all else in float32. The activations between blocks are float32.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.bfloat16,
    ) -> None:
        if checkpoint.architecture not in ARCHITECTURES:
            raise ConversionError(
                f"{checkpoint.id}: the blocks of {checkpoint.architecture} cannot be streamed; "
                f"those of {', '.join(ARCHITECTURES)} can"
            )
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.precision = precision
        self._wide = torch.float64 if precision == torch.float64 else torch.float32
        self._skeleton = skeleton(checkpoint)
        self.linears = [
            name
            for name, module in self._skeleton.model.layers[0].named_modules()
            if isinstance(module, nn.Linear)
        ]
        """Names of the linears of a block, relative to it: ``self_attn.q_proj``."""
        self.state_names = list(self._skeleton.model.layers[0].state_dict())
        """Names of all tensors of a block, relative to it: ``self_attn.q_proj.weight``."""
        self._arguments: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._skeleton.model.layers)

    def prefix(self, index: int) -> str:
        """What precedes the names of block ``index``'s tensors: ``model.layers.3.``."""
        return f"model.layers.{index}."

    def tensors_outside(self) -> Iterator[str]:
        """Names of the tensors that belong to no block: embeddings, final norm, output layer."""
        inside = tuple(self.prefix(index) for index in range(len(self)))
        return (name for name in self.checkpoint.tensors if not name.startswith(inside))

    def embed(self, ids: torch.Tensor) -> Activations:
        """Activations before the first block, of ``ids`` (samples, T), in batches of bounded size.

        Also notes what the model passes to each block besides them (rotary embeddings, masks).
        """
        decoder = copy.deepcopy(self._skeleton.model)
        recorders = [_Recorder() for _ in decoder.layers]
        decoder.layers = nn.ModuleList(recorders)
        decoder.norm = nn.Identity()
        weight = self.checkpoint.read("model.embed_tokens.weight").float()
        decoder.embed_tokens.load_state_dict({"weight": weight}, assign=True)
        # Built on no device with the skeleton, so that its frequencies were never computed.
        decoder.rotary_emb = type(decoder.rotary_emb)(config=self._skeleton.config)
        batch = max(1, _BATCH_TOKENS // ids.shape[1])
        shape = (*ids.shape, weight.shape[1])
        hidden = Activations(shape, batch=batch, device=self.device)
        with torch.no_grad():
            decoder(input_ids=ids[:1], use_cache=False)
            self._arguments = [_to(recorder.arguments, self.device) for recorder in recorders]
            for index, part in enumerate(torch.split(ids, batch)):
                decoder(input_ids=part, use_cache=False)
                hidden.replace(index, recorders[0].hidden)
        return hidden

    def load(self, index: int) -> nn.Module:
        """Block ``index`` on the device, its weights in float32 or, for that precision, float64."""
        block: nn.Module = copy.deepcopy(self._skeleton.model.layers[index])
        prefix = self.prefix(index)
        state = {
            # Moved as it is stored and widened there: half of the bytes go over the bus.
            name: self.checkpoint.read(prefix + name).to(self.device).to(self._wide)
            for name in block.state_dict()
        }
        block.load_state_dict(state, assign=True)
        return block.eval().requires_grad_(False)

    def arguments(self, index: int) -> dict[str, Any]:
        """What the model passes to block ``index`` besides the activations."""
        return self._arguments[index]

    def run(self, index: int, block: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """The block's output for one batch of activations, both (B, T, hidden) float32 on the
        device."""
        with stage("forward"), torch.no_grad(), self.autocast():
            output: torch.Tensor = block(batch.to(self._wide), **self._arguments[index])
            return output.float()

    def autocast(self) -> torch.autocast:
        """The precision of matrix products."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16
        )


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with and returns the activations as is."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.hidden, self.arguments = hidden, arguments
        return hidden


def skeleton(checkpoint: Checkpoint) -> Any:
    """The model as transformers builds it from the configuration, without any weights.

    Raise CheckpointError where the checkpoint's tensors are not the ones it needs.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            checkpoint.hf_config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            trust_remote_code=False,
        )
    tied = model.config.tie_word_embeddings
    checkpoint.check_shapes(
        {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
    )
    return model


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(part, device) for part in value)
    if isinstance(value, dict):
        return {key: _to(part, device) for key, part in value.items()}
    return value
