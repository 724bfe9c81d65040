"""llama.cpp's file types (``llama_ftype``): their names, and which of them quantkit makes."""

from __future__ import annotations

from quantkit.errors import RecipeError, did_you_mean
from quantkit.models.spec import Spec

FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32,
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7,
    "Q2_K": 10, "Q2_K_S": 21, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18,
    "IQ1_S": 24, "IQ1_M": 31, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ2_S": 28, "IQ2_M": 29,
    "IQ3_XXS": 23, "IQ3_XS": 22, "IQ3_S": 26, "IQ3_M": 27, "IQ4_NL": 25, "IQ4_XS": 30,
    "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38, "NVFP4": 39, "Q1_0": 40, "Q2_0": 41,
}  # fmt: skip
"""Name and number of every file type that a GGUF may declare in ``general.file_type``."""

UNQUANTIZED = ("F32", "F16", "BF16")
"""The types that only round; the others are llama.cpp's mixes of quantized types."""

OFFERED = tuple(name for name in FILE_TYPES if name != "NVFP4")
"""What quantkit makes: all that ``llama-quantize`` does."""

TENSOR_TYPES = (
    "F32", "F16", "BF16", "Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
"""ggml's types that a single tensor can be quantized to."""


def check(spec: Spec) -> str:
    """The file type that ``spec`` asks for; raise RecipeError unless quantkit makes it."""
    scheme = spec.scheme
    if scheme == "NVFP4":
        raise RecipeError(
            f"spec {spec}: llama.cpp does not quantize whole files to NVFP4, it only converts "
            "ModelOpt's checkpoints; single tensors can be: tensor_types: {ffn_down: NVFP4}"
        )
    if scheme not in OFFERED:
        raise RecipeError(
            f"spec {spec}: unknown scheme {scheme!r}; gguf takes {', '.join(OFFERED)}"
            + did_you_mean(scheme, OFFERED)
        )
    return scheme


def name_of(number: int | None) -> str:
    """The name of a ``general.file_type``; ``unknown`` where it is absent or of another age."""
    return next((name for name, value in FILE_TYPES.items() if value == number), "unknown")
