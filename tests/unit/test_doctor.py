"""The doctor's judgement, of machines made by hand."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from quantkit.doctor import Diagnosis, EngineState, features, judge
from quantkit.doctor.engines import Found, reason
from quantkit.doctor.machine import Gpu, Machine, cpu_flags, gpus

GB = 10**9
SERVER = Machine(
    system="Linux", architecture="x86_64", python="3.12.1", cpu="a Xeon", cores=16,
    cpu_flags=frozenset({"avx2", "avx512f", "avx512_bf16", "amx_tile"}), memory_bytes=64 * GB,
    memory_available_bytes=60 * GB, home="/home/a/.cache/quantkit", disk_free_bytes=100 * GB,
    gpus=(), cuda_compiler=None,
)  # fmt: skip
LAPTOP = replace(SERVER, cpu="an older Core", cpu_flags=frozenset({"avx", "avx2"}))
MAC = replace(
    SERVER, system="Darwin", architecture="arm64", cpu_flags=frozenset({"asimd", "asimddp"})
)
H100 = Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, "580.65.06", "9.0")
WITH_GPU = replace(SERVER, gpus=(H100,), cuda_compiler="/usr/bin/nvcc")

ALL = {
    name: Found(name, "1.0", "cpu") for name in ("transformers", "llamacpp", "llama-server", "vllm")
}


def judged(
    machine: Machine, *changed: Found, missing: tuple[str, ...] = (), checkout: bool = True
) -> tuple[Diagnosis, dict[str, EngineState]]:
    found = ALL | {one.name: one for one in changed}
    diagnosis = judge(machine, list(found.values()), missing, checkout=checkout)
    return diagnosis, {engine.name: engine for engine in diagnosis.engines}


def test_judge_where_all_is_well() -> None:
    diagnosis, engines = judged(SERVER)
    assert diagnosis.ok
    assert diagnosis.todo == []
    assert all(engine.runs and not engine.notes for engine in engines.values())


@pytest.mark.parametrize("name", ["transformers", "llamacpp", "llama-server"])
def test_judge_is_not_ok_without_a_core_engine(name: str) -> None:
    for found in (Found(name), Found(name, "1.0", error="no such library")):
        diagnosis, engines = judged(SERVER, found)
        assert not diagnosis.ok
        assert not engines[name].runs
        assert engines[name].notes == (found.error or "not installed",)
        assert [what for what, _ in diagnosis.todo] == [name]


def test_judge_is_ok_without_vllm_and_names_the_command() -> None:
    diagnosis, engines = judged(SERVER, Found("vllm"))
    assert diagnosis.ok
    assert not engines["vllm"].runs
    assert diagnosis.todo == [("vllm", "quantkit engines install vllm")]


@pytest.mark.parametrize(
    ("machine", "note"),
    [
        (MAC, "there is no build of it for macOS"),
        (replace(LAPTOP, cpu_flags=frozenset({"avx"})), "its build for the CPU needs AVX2"),
        (
            replace(SERVER, disk_free_bytes=4 * GB),
            "needs 5 GB of disk in /home/a/.cache/quantkit; set QUANTKIT_HOME",
        ),
        (
            replace(WITH_GPU, disk_free_bytes=14 * GB),
            "needs 15 GB of disk in /home/a/.cache/quantkit; set QUANTKIT_HOME",
        ),
    ],
)
def test_judge_offers_no_vllm_where_it_cannot_be_had(machine: Machine, note: str) -> None:
    _, engines = judged(machine, Found("vllm"))
    assert engines["vllm"].notes == (note,)
    assert engines["vllm"].fix is None


def test_judge_says_what_vllm_does_not_serve_on_an_older_cpu() -> None:
    _, engines = judged(LAPTOP)
    assert engines["vllm"].runs
    assert engines["vllm"].notes == (
        "no GPTQ or AWQ: the processor has no AVX-512",
        "no quantized mixtures of experts: the processor has no AMX",
    )
    _, engines = judged(LAPTOP, Found("vllm", "1.0", "cuda"))
    assert engines["vllm"].notes == ()


def test_judge_tells_of_builds_that_leave_the_gpu_idle() -> None:
    diagnosis, engines = judged(WITH_GPU)
    assert diagnosis.ok
    assert diagnosis.todo == [
        ("transformers, llamacpp, llama-server", "make setup"),
        ("vllm", "quantkit engines install vllm --force --device cuda"),
    ]
    on_gpu = [replace(one, device="cuda") for one in ALL.values()]
    assert judged(WITH_GPU, *on_gpu)[0].todo == []
    no_compiler = replace(WITH_GPU, cuda_compiler=None)
    _, engines = judged(no_compiler)
    assert engines["llamacpp"].fix is None
    assert "install the CUDA toolkit (nvcc)" in engines["llamacpp"].notes[0]


def test_judge_leaves_the_users_own_engines_alone() -> None:
    theirs = [replace(ALL[name], own=True) for name in ("llama-server", "vllm")]
    _, engines = judged(WITH_GPU, *theirs)
    for name in ("llama-server", "vllm"):
        assert engines[name].notes == ("yours",)
        assert engines[name].fix is None


def test_judge_without_a_checkout_names_pip() -> None:
    tools = "-DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON -DLLAMA_TOOLS_INSTALL=ON"
    nothing = Found("llamacpp"), Found("llama-server")
    diagnosis, _ = judged(SERVER, *nothing, missing=("llamacpp", "eval"), checkout=False)
    assert diagnosis.todo == [
        (
            "llamacpp, llama-server",
            f"CMAKE_ARGS='{tools}' pip install --no-cache-dir 'quantkit[llamacpp]'",
        ),
        ("lm-eval's tasks, such as MMLU", "pip install 'quantkit[eval]'"),
    ]
    diagnosis, _ = judged(WITH_GPU, nothing[1], checkout=False)
    assert diagnosis.todo[:2] == [
        ("transformers", "pip install --force-reinstall torch"),
        (
            "llamacpp, llama-server",
            f"CMAKE_ARGS='{tools} -DGGML_CUDA=ON' pip install --no-cache-dir --force-reinstall "
            "--no-deps llama-cpp-python",
        ),
    ]


@pytest.mark.parametrize(
    ("machine", "here"),
    [
        (LAPTOP, {"avx2": True, "avx512f": False, "avx512_bf16": False, "amx_tile": False}),
        (MAC, {"asimddp": True, "i8mm": False, "sve": False, "bf16": False}),
    ],
)
def test_features_are_those_of_the_architecture(machine: Machine, here: dict[str, bool]) -> None:
    assert {flag: there for flag, there, _ in features(machine)} == here


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\n\nflags\t\t: fpu\n", "fpu avx2 avx512f"),
        ("processor : 0\nFeatures\t: fp asimd asimddp\n", "fp asimd asimddp"),
        ("processor : 0\n", ""),
    ],
)
def test_cpu_flags_of_x86_and_arm(text: str, flags: str) -> None:
    assert cpu_flags(text) == frozenset(flags.split())


def test_gpus_are_the_lines_of_nvidia_smi() -> None:
    line = "NVIDIA H100 80GB HBM3, 81559 MiB, 580.65.06, 9.0"
    assert gpus(f"{line}\n{line}\n") == (H100, H100)
    assert gpus("No devices were found\n") == ()
    assert gpus("NVIDIA-SMI has failed, because, of, something\n") == ()


@pytest.mark.parametrize(
    ("code", "stderr", "expected"),
    [
        (0, "a warning", None),
        (1, "Traceback\nImportError: libcuda.so.1\n", "ImportError: libcuda.so.1"),
        (3, "", "exit code 3"),
        (-signal.SIGILL, "", "it was built for another processor (illegal instruction)"),
        (-signal.SIGKILL, "", "it is ended by SIGKILL"),
    ],
)
def test_reason_of_an_engine_that_does_not_start(
    code: int, stderr: str, expected: str | None
) -> None:
    assert reason(code, stderr) == expected
