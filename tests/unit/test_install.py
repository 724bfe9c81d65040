"""What `make` decides and builds before quantkit is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest

from install import llama_cpp
from install.accelerator import detect

ROOT = Path(__file__).parents[2]


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("system", "gpu", "compiler", "accelerator"),
    [
        ("Linux", None, None, "cpu"),
        ("Linux", None, "/usr/bin/nvcc", "cpu"),
        ("Linux", "NVIDIA L4", None, "cpu"),
        ("Linux", "NVIDIA L4", "/usr/bin/nvcc", "cuda"),
        ("Darwin", None, None, "metal"),
    ],
)
def test_detect(system: str, gpu: str | None, compiler: str | None, accelerator: str) -> None:
    assert detect(system, gpu, compiler)[0] == accelerator


def test_detect_says_what_is_missing_for_cuda() -> None:
    _, reason = detect("Linux", "NVIDIA L4", None)
    assert reason.startswith("NVIDIA L4 found, but no CUDA compiler (nvcc)")
    assert "make setup ACCEL=cuda" in reason


@pytest.mark.parametrize(
    ("programs", "asked", "printed", "reason"),
    [
        ({"nvidia-smi": "echo NVIDIA L4"}, "", "cpu", "no CUDA compiler"),
        ({"nvidia-smi": "echo NVIDIA L4", "nvcc": ":"}, "", "cuda", "NVIDIA L4, "),
        ({"nvidia-smi": "echo failed; exit 9", "nvcc": ":"}, "", "cpu", "no NVIDIA GPU found"),
        ({"nvcc": ":"}, "", "cpu", "no NVIDIA GPU found"),
        ({}, "cuda", "cuda", "asked for"),
        ({"nvidia-smi": "echo NVIDIA L4", "nvcc": ":"}, "cpu", "cpu", "asked for"),
        ({}, "gpu", "", "ACCEL=gpu: expected cpu, cuda, metal"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is not about these programs")
def test_accelerator_of_the_programs_on_path(
    tmp_path: Path, programs: dict[str, str], asked: str, printed: str, reason: str
) -> None:
    for name, script in programs.items():
        program(tmp_path / name, script)
    environment = {key: value for key, value in os.environ.items() if key != "CUDACXX"}
    ended = subprocess.run(
        [sys.executable, ROOT / "install" / "accelerator.py", asked],
        env=environment | {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.stdout.strip() == printed
    assert ended.returncode == (0 if printed else 2)
    assert reason in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def wheel(directory: Path, *names: str) -> Path:
    path = directory / "llama_cpp_python-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "")
    return path


def test_missing_is_what_a_wheel_lacks(tmp_path: Path) -> None:
    tools = [f"bin/{name}" for name in llama_cpp.TOOLS]
    tools.append("llama_cpp/converter/convert_hf_to_gguf.py")
    cpu = wheel(tmp_path, *tools, "lib/libggml-cpu.so")
    assert llama_cpp.missing(cpu, "cpu") == []
    assert llama_cpp.missing(cpu, "cuda") == ["libggml-cuda.so"]
    assert llama_cpp.missing(wheel(tmp_path, *tools, "lib/libggml-cuda.so"), "cuda") == []
    assert llama_cpp.missing(wheel(tmp_path, *tools[1:]), "cpu") == ["llama-server"]
    assert llama_cpp.missing(wheel(tmp_path, *tools[:-1]), "cpu") == ["convert_hf_to_gguf.py"]


def test_tools_that_the_tests_compare_with_are_built() -> None:
    """Every program of llama.cpp's that a test names."""
    named: set[str] = set()
    for file in (ROOT / "tests").rglob("*.py"):
        named |= set(re.findall(r"\bllama-(?:quantize|imatrix|perplexity|gguf-split|server)\b",
                                file.read_text()))  # fmt: skip
    assert named <= set(llama_cpp.TOOLS)


def test_kept_wheels_are_of_one_version_and_one_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path))
    version = llama_cpp.pinned((ROOT / "constraints.txt").read_text())
    assert version == installed_version("llama-cpp-python")
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    places = {llama_cpp.kept_in(v, a) for v in (version, "0.3.35") for a in ("cpu", "cuda")}
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
    places.add(llama_cpp.kept_in(version, "cpu"))
    assert len(places) == 5
    kept = llama_cpp.kept_in(version, "cpu")
    kept.mkdir(parents=True)
    built = wheel(kept)
    assert llama_cpp.main("cpu") == 0
    assert capsys.readouterr().out == f"{built}\n"


def test_build_that_fails_ends_with_the_compilers_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    python = tmp_path / "python"
    program(python, "echo Building wheel; echo 'x.cpp:1: error: no such header'; exit 1")
    monkeypatch.setattr(sys, "executable", str(python))
    assert llama_cpp.main("cpu") == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "the build failed: x.cpp:1: error: no such header; see " in told.err
    assert not list((tmp_path / "home" / "wheels").rglob("*.whl"))


def test_server_that_does_not_start_is_no_build(tmp_path: Path) -> None:
    path = tmp_path / "llama_cpp_python-1.0-py3-none-any.whl"
    for script, message in (
        ("echo 'error: libmtmd.so.0: cannot open shared object file' >&2; exit 127", "libmtmd"),
        ("exit 1", "no output"),
    ):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("bin/llama-server", f"#!/bin/sh\n{script}\n")
        with pytest.raises(llama_cpp.BuildError, match=f"does not start: .*{message}"):
            llama_cpp.start_server(path, tmp_path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("bin/llama-server", "#!/bin/sh\ntest $1 = --version\n")
    llama_cpp.start_server(path, tmp_path)
