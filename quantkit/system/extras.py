"""What only some commands import: the extras of the package, ``pip install 'quantkit[bench]'``."""

from __future__ import annotations

from importlib.util import find_spec

from quantkit.errors import ToolchainError

EXTRAS = {
    "llamacpp": {"llama_cpp": "llama-cpp-python"},
    "eval": {"lm_eval": "lm-eval"},
    "bench": {"guidellm": "guidellm"},
    "serve": {"aiohttp": "aiohttp", "prometheus_client": "prometheus-client", "uvloop": "uvloop"},
}
"""The modules that each extra brings, and the packages that these come with."""
PURPOSES = {
    "llamacpp": "making, measuring and inspecting GGUF",
    "eval": "lm-eval's tasks, such as MMLU",
    "bench": "measuring throughput and latency",
    "serve": "`quantkit serve`",
}
"""What each is needed for."""


def require(extra: str) -> None:
    """Raise ToolchainError, with the command that installs it, where a module is missing."""
    for module in EXTRAS[extra]:
        if find_spec(module) is None:
            raise ToolchainError(_needs(extra, module))


def missing(extra: str) -> ToolchainError:
    """The error of ``require``, where something else has shown that the extra is not there."""
    return ToolchainError(_needs(extra, next(iter(EXTRAS[extra]))))


def missing_extras() -> list[str]:
    """Extras with a module that is missing here."""
    return [name for name, modules in EXTRAS.items() if not all(map(find_spec, modules))]


def explained(error: ModuleNotFoundError) -> str | None:
    """What to install for the module that was not found; None where it is of no extra."""
    module = (error.name or "").partition(".")[0]
    found = [extra for extra, modules in EXTRAS.items() if module in modules]
    return _needs(found[0], module) if found else None


def install_command(extra: str) -> str:
    """How to get it."""
    return f"pip install 'quantkit[{extra}]'"


def _needs(extra: str, module: str) -> str:
    package = EXTRAS[extra][module]
    return (
        f"{package} is not installed; it is needed for {PURPOSES[extra]}; "
        f"run: {install_command(extra)}"
    )
