"""Rotary embeddings: what a configuration says of them, in llama.cpp's metadata and tensors."""

from __future__ import annotations

import math
from typing import Any

from quantkit.formats.gguf.architectures.architecture import Config

_MIRRORED = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""What some configurations have beside ``rope_parameters``, not in it."""


def rope_values(config: dict[str, Any]) -> Config:
    """``rope`` (the parameters of full attention), ``local_rope_theta`` (of windows), and the
    metadata that follows, under the names of GGUFWriter's methods: ``rope_scaling_factor``."""
    import gguf

    given = config.get("rope_parameters") or {}
    rope = dict(given.get("full_attention", given))
    for key in _MIRRORED:
        if key in config and "full_attention" not in given:
            rope.setdefault(key, config[key])
    values: Config = {
        "rope": rope,
        "local_rope_theta": given.get("sliding_attention", {}).get("rope_theta"),
        "rope_theta": rope.get("rope_theta"),
    }
    kind = rope.get("rope_type")
    if kind in ("linear", "yarn"):
        values["rope_scaling_type"] = gguf.RopeScalingType(kind)
        values["rope_scaling_factor"] = rope.get("factor")
    if kind == "yarn":
        values["rope_scaling_orig_ctx_len"] = rope["original_max_position_embeddings"]
        values["rope_scaling_yarn_ext_factor"] = rope.get("extrapolation_factor")
        values["rope_scaling_yarn_attn_factor"] = rope.get("attention_factor")
        values["rope_scaling_yarn_beta_fast"] = rope.get("beta_fast")
        values["rope_scaling_yarn_beta_slow"] = rope.get("beta_slow")
    return values


def llama3_factors(c: Config) -> list[float]:
    """Llama 3.1's frequency factors, (head_dim / 2); empty where the model has none.

    llama.cpp divides each rotary frequency by its factor. Short wavelengths are kept, long ones
    slowed by ``factor``, those between interpolated (transformers: ``rope_type: llama3``).
    """
    import torch

    rope = c["rope"]
    if rope.get("rope_type") != "llama3":
        return []
    dim = c["head_size"]
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim))
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    trained = rope["original_max_position_embeddings"]

    def slowed(frequency: torch.Tensor) -> float:
        wavelength = 2 * math.pi / frequency
        if wavelength < trained / high:
            return 1.0
        if wavelength > trained / low:
            return float(factor)
        smooth = (trained / wavelength - low) / (high - low)
        return float(1 / ((1 - smooth) / factor + smooth))

    return [slowed(frequency) for frequency in frequencies]


def rope_tensors(c: Config) -> dict[str, list[float]]:
    """The tensors that a GGUF has for rotary embeddings, by name; they come before all others."""
    if factors := llama3_factors(c):
        return {"rope_freqs.weight": factors}
    if c["rope"].get("rope_type") == "longrope":
        return {
            "rope_factors_long.weight": c["rope"]["long_factor"],
            "rope_factors_short.weight": c["rope"]["short_factor"],
        }
    return {}


def longrope_attention_factor(c: Config) -> float:
    """How much longrope scales the attention."""
    trained = c["rope"]["original_max_position_embeddings"]
    scale = c["max_position_embeddings"] / trained
    return math.sqrt(1 + math.log(scale) / math.log(trained)) if scale > 1 else 1.0
