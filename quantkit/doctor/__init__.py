"""Whether quantkit can work on this machine, what is missing, and the command that gets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.doctor.engines import CORE, Found, ask_all
from quantkit.doctor.machine import Machine, look
from quantkit.engines.vllm.unsupported import lacks_expert_kernels, lacks_packed_kernels
from quantkit.system.extras import PURPOSES, install_command, missing_extras

_USES = {
    "avx2": "fast kernels of llama.cpp; required by vLLM",
    "avx512f": "GPTQ and AWQ on vLLM",
    "avx512_bf16": "fast bfloat16: calibration, and the source on vLLM",
    "amx_tile": "quantized mixtures of experts on vLLM; faster bfloat16",
}
"""What a feature of an x86 processor is good for, in the order shown."""
_USES_ARM = {
    "asimddp": "fast kernels of llama.cpp",
    "i8mm": "faster kernels of llama.cpp",
    "sve": "faster kernels of llama.cpp",
    "bf16": "fast bfloat16: calibration, and the source on vLLM",
}
_VLLM_BYTES = {"cpu": 5_000_000_000, "cuda": 15_000_000_000}
"""What its environment takes on disk, while it is installed."""


@dataclass(frozen=True)
class EngineState:
    """One engine here: whether it runs, and what a person should know or do."""

    name: str
    version: str | None
    device: str | None
    runs: bool
    notes: tuple[str, ...]
    fix: str | None
    """The one command that gets or repairs it; None where nothing is to be done, or can be."""


@dataclass(frozen=True)
class Diagnosis:
    """The machine and what can run on it."""

    machine: Machine
    engines: tuple[EngineState, ...]
    missing_extras: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the core engines run."""
        return all(engine.runs for engine in self.engines if engine.name in CORE)

    @property
    def todo(self) -> list[tuple[str, str]]:
        """What is missing or could be better, and the one command for it; engines first."""
        found: dict[str, list[str]] = {}
        for engine in self.engines:
            if engine.fix:
                found.setdefault(engine.fix, []).append(engine.name)
        for extra in self.missing_extras:
            found[install_command(extra)] = [PURPOSES[extra]]
        return [(", ".join(names), command) for command, names in found.items()]


def diagnose() -> Diagnosis:
    """Look at this machine and start every engine once."""
    checkout = (Path(__file__).parents[2] / "Makefile").is_file()
    return judge(look(), ask_all(), missing_extras(), checkout=checkout)


def judge(
    machine: Machine, found: Sequence[Found], missing: Sequence[str], *, checkout: bool
) -> Diagnosis:
    """What follows from what was seen; ``checkout``: whether `make setup` is there to be run."""
    library = any(one.name == "llamacpp" and one.version for one in found)
    commands = _Commands(machine, checkout, library)
    states = tuple(_JUDGES[one.name](machine, one, commands) for one in found)
    shown = tuple(extra for extra in missing if extra != "llamacpp")  # an engine's fix says it
    return Diagnosis(machine, states, shown)


def features(machine: Machine) -> list[tuple[str, bool, str]]:
    """Each feature of the processor that matters: whether it is there, and what it is for."""
    uses = _USES if machine.architecture in ("x86_64", "AMD64") else _USES_ARM
    return [(flag, flag in machine.cpu_flags, use) for flag, use in uses.items()]


@dataclass(frozen=True)
class _Commands:
    """How things are got here."""

    machine: Machine
    checkout: bool
    library: bool
    """Whether llama-cpp-python is installed, whatever it was built with."""

    def llama_cpp(self) -> str:
        if self.checkout:
            return "make setup"
        cuda = bool(self.machine.gpus) and self.machine.cuda_compiler is not None
        options = "-DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON -DLLAMA_TOOLS_INSTALL=ON"
        options += " -DGGML_CUDA=ON" if cuda else ""
        # Without pip's cache: it would answer with what was built for other options.
        install = "pip install --no-cache-dir --force-reinstall --no-deps llama-cpp-python"
        if not self.library:
            install = "pip install --no-cache-dir 'quantkit[llamacpp]'"
        return f"CMAKE_ARGS='{options}' {install}"

    def vllm(self, *options: str) -> str:
        return " ".join(["quantkit engines install vllm", *options])

    def torch(self) -> str:
        return "make setup" if self.checkout else "pip install --force-reinstall torch"


def _transformers(machine: Machine, found: Found, commands: _Commands) -> EngineState:
    if not _answers(found):
        return _broken(found, "pip install quantkit" if found.version is None else commands.torch())
    if machine.gpus and found.device == "cpu":
        note = "torch is built for the CPU: calibration and GPTQ leave the GPU idle"
        return _running(found, [note], commands.torch())
    return _running(found, [])


def _llama(machine: Machine, found: Found, commands: _Commands) -> EngineState:
    if not _answers(found):
        return _broken(found, commands.llama_cpp())
    notes: list[str] = []
    if found.device != "cpu" or found.own or not machine.gpus:
        if machine.architecture == "x86_64" and "avx2" not in machine.cpu_flags:
            notes.append("slow: the processor has no AVX2")
        return _running(found, notes)
    if machine.cuda_compiler is None:
        notes.append("built for the CPU; install the CUDA toolkit (nvcc) to build it for the GPU")
        return _running(found, notes)
    return _running(found, ["built for the CPU: the GPU is idle"], commands.llama_cpp())


def _vllm(machine: Machine, found: Found, commands: _Commands) -> EngineState:
    device = "cuda" if machine.gpus else "cpu"
    flags = " ".join(machine.cpu_flags)
    x86 = machine.architecture == "x86_64"
    if found.version is None:
        if machine.system == "Darwin":
            return _broken(found, None, "there is no build of it for macOS")
        if device == "cpu" and x86 and "avx2" not in machine.cpu_flags:
            return _broken(found, None, "its build for the CPU needs AVX2")
        if machine.disk_free_bytes < _VLLM_BYTES[device]:
            need = f"{_VLLM_BYTES[device] / 1e9:.0f} GB"
            return _broken(
                found, None, f"needs {need} of disk in {machine.home}; set QUANTKIT_HOME"
            )
        return _broken(found, commands.vllm())
    if found.error:
        return _broken(found, commands.vllm("--force"))
    notes = []
    if found.device == "cpu":
        if machine.gpus and not found.own:
            return _running(
                found,
                ["built for the CPU: the GPU is idle"],
                commands.vllm("--force", "--device", "cuda"),
            )
        if lacks_packed_kernels(flags):
            notes.append("no GPTQ or AWQ: the processor has no AVX-512")
        if x86 and lacks_expert_kernels(flags):
            notes.append("no quantized mixtures of experts: the processor has no AMX")
    return _running(found, notes)


_JUDGES: dict[str, Callable[[Machine, Found, _Commands], EngineState]] = {
    "transformers": _transformers,
    "llamacpp": _llama,
    "llama-server": _llama,
    "vllm": _vllm,
}


def _answers(found: Found) -> bool:
    return found.version is not None and found.error is None


def _broken(found: Found, fix: str | None, note: str | None = None) -> EngineState:
    notes = [note or found.error or "not installed"]
    return EngineState(found.name, found.version, found.device, False, tuple(notes), fix)


def _running(found: Found, notes: Sequence[str], fix: str | None = None) -> EngineState:
    yours = ["yours"] if found.own else []
    return EngineState(found.name, found.version, found.device, True, (*yours, *notes), fix)
