"""The machine and the tools that a run was made with."""

from __future__ import annotations

import platform
from importlib import metadata

import psutil

from quantkit.ledger import Environment
from quantkit.ledger.load import MemoryBandwidth
from quantkit.system.machine import cores, cpu_name, gpu
from quantkit.version import __version__

_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "gguf",
    "llama-cpp-python",
    "lm-eval",
    "guidellm",
)


def environment(memory_bandwidth: MemoryBandwidth | None = None) -> Environment:
    """What is worth recording beside numbers: processor, memory, versions."""
    return Environment(
        cpu=cpu_name(),
        cores=cores(),
        gpu=gpu(),
        memory_bytes=psutil.virtual_memory().total,
        platform=platform.platform(),
        tools={"quantkit": __version__, "python": platform.python_version(), **_tools()},
        memory_bandwidth=memory_bandwidth,
    )


def _tools() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
