"""What vLLM runs of each architecture, and which of its linears it runs as one.

``architectures.json`` is what vLLM itself says: ``python -m tests.integration.vllm_architectures``
asks the installed one again. What is here besides was found by ``tests/integration/vllm_sweep.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict

Parts = Mapping[str, tuple[str, ...]]
"""By the name of a linear that is run, the names of those that it is made of."""

USUAL: Parts = MappingProxyType(
    {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
)
"""What is run as one in most architectures, and in transformers' code when vLLM runs that."""

SEEN = (
    "Cohere2ForCausalLM",
    "Ernie4_5ForCausalLM",
    "Exaone4ForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma4ForCausalLM",
    "Glm4ForCausalLM",
    "GraniteForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "Lfm2ForCausalLM",
    "LlamaForCausalLM",
    "Ministral3ForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3_5ForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
)
"""Architectures of which vLLM computed from GPTQ and AWQ what was evaluated."""

NO_ROTARY_KERNEL = {"custom_ops": ["all", "-rotary_embedding"]}
"""vLLM's ``compilation_config`` for those that it ``rotated_by_heads``."""

_BY_HEADS = ("Lfm2ForCausalLM",)
"""Those of ``SEEN`` that give vLLM's rotary embedding a tensor with an axis of heads."""

_UNREAD = {"GptOssForCausalLM": "it leaves out the weights of quantized experts, and does not say"}
"""By architecture, why vLLM computes something else from GPTQ and AWQ than was evaluated."""

_NOT_ON_A_CPU = {"MiniMaxM2ForCausalLM": "its router weighs experts by sigmoids"}
"""By architecture, what of it vLLM has no kernel for there."""

_QKV = ("q_proj", "k_proj", "v_proj")
_MISREAD = {"Llama4ForCausalLM": _QKV, "Llama4ForConditionalGeneration": _QKV}
"""Linears that vLLM computes wrongly from GPTQ and AWQ: it turns the rows of Llama 4's queries and
keys around as its rotary embedding wants them, but not where they are packed so."""

_FILE = Path(__file__).with_name("architectures.json")


@dataclass(frozen=True)
class Fusion:
    """What is run as one in an architecture, and how vLLM asks what of it is quantized.

    ``declared``: what it then takes a linear to be made of. ``called``: other names of modules.
    ``renamed``: what it puts in place of parts of names.
    """

    parts: Parts
    declared: Parts
    called: Mapping[str, str] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, architecture: str) -> Fusion:
        """As vLLM has it; as usual where it does not have it, or runs transformers' code."""
        found = _asked().architectures.get(architecture)
        if found is None or found.code == "transformers":
            return cls(USUAL, USUAL)
        declared = {k: parts for k, parts in found.fused.items() if k not in found.undeclared}
        return cls({**USUAL, **found.fused}, declared, found.called, found.renamed)

    def asked_as(self, name: str) -> str:
        """The name by which vLLM asks for a module."""
        for old, new in self.renamed:
            if name.startswith(old) or (old.startswith(".") and old in name):
                name = name.replace(old, new, 1)
        return self._called(name)

    def _called(self, name: str) -> str:
        return ".".join(self.called.get(part, part) for part in name.split("."))

    def misnamed(self, linears: set[str]) -> list[str]:
        """Names by which vLLM asks for ``linears``, a block's own, and which it does not trace back
        to theirs: none where all that is run as one is declared and is stored in its parts."""
        found = {}
        for name in linears:
            stem, dot, last = name.rpartition(".")
            for whole, parts in self.parts.items():
                if last in parts and whole not in self.declared:
                    found[f"{stem}{dot}{whole}"] = True
            if last in self.declared and last not in self.declared[last]:
                found |= {f"{stem}{dot}{part}": True for part in self.declared[last]}
            if self._called(name) != name:
                found[self._called(name)] = True
        return sorted(found)


def version() -> str:
    """The vLLM that was asked."""
    return _asked().vllm


def has(architecture: str) -> bool:
    """Whether vLLM runs it, by its own code or by transformers'."""
    return architecture in _asked().architectures


def needs(architecture: str) -> str | None:
    """The package besides its own requirements without which vLLM does not load it."""
    return _asked().architectures[architecture].needs if has(architecture) else None


def not_on_a_cpu(architecture: str) -> str | None:
    """What of it vLLM has no kernel for there; None of nothing, as far as is known."""
    return _NOT_ON_A_CPU.get(architecture)


def misread(architecture: str) -> tuple[str, ...]:
    """The last parts of the names of linears that vLLM computes wrongly from GPTQ and AWQ, and what
    it runs as one with them."""
    return _MISREAD.get(architecture, ())


def unread(architecture: str) -> str | None:
    """Why vLLM computes something else from GPTQ and AWQ than was evaluated; None where it does
    not, as far as is known."""
    return _UNREAD.get(architecture)


def rotated_by_heads(architecture: str) -> bool:
    """Whether it gives vLLM's rotary embedding a tensor with an axis of heads, or may. The kernel
    for the CPU computes wrong numbers from that, PyTorch's code does not: of LFM2 and DeepSeek."""
    return architecture in _BY_HEADS or architecture not in SEEN


def known_of(architecture: str, format_: str) -> list[str]:
    """What to know of a variant of this format before it is made: notes."""
    if not has(architecture):
        return [f"vLLM {version()} does not have {architecture}: it will not serve this variant"]
    if why := unread(architecture):
        return [f"vLLM {version()} cannot serve {format_} of {architecture}: {why}; use gguf"]
    notes = []
    if needed := needs(architecture):
        notes.append(f"vLLM for the CPU does not load {architecture} without {needed}")
    if why := not_on_a_cpu(architecture):
        notes.append(f"vLLM has no kernel for {architecture} on a CPU: {why}")
    if architecture not in SEEN:
        notes.append(f"{format_} of {architecture} is not yet tested in vLLM")
    return notes


class _Architecture(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    code: Literal["vllm", "transformers"]
    needs: str | None
    fused: dict[str, tuple[str, ...]]
    undeclared: tuple[str, ...]
    called: dict[str, str]
    renamed: tuple[tuple[str, str], ...]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    vllm: str
    architectures: dict[str, _Architecture]


@lru_cache(maxsize=1)
def _asked() -> _Asked:
    return _Asked.model_validate_json(_FILE.read_text(encoding="utf-8"))
