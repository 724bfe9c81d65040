from __future__ import annotations

import fcntl
import io
import subprocess
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from quantkit import toolchains
from quantkit.errors import ToolchainError
from quantkit.producers.gguf import llama_cpp_converter
from quantkit.toolchains import own
from quantkit.toolchains.recipes import RECIPES, Recipe


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make_wheel(directory: Path, version: str) -> Path:
    """A wheel of one module, ``toyengine``, which knows its version."""
    wheel = directory / f"toyengine-{version}-py3-none-any.whl"
    info = f"toyengine-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("toyengine.py", f"__version__ = {version!r}\n")
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toyengine\nVersion: {version}\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return wheel


def offer(
    monkeypatch: pytest.MonkeyPatch, *pip: tuple[str, ...], module: str = "toyengine"
) -> None:
    recipe = Recipe("cpu", module, pip)
    monkeypatch.setattr(toolchains, "RECIPES", {"vllm": {"cpu": recipe, "cuda": recipe}})


def runs(python: Path) -> str:
    code = "import toyengine; print(toyengine.__version__)"
    return subprocess.check_output([str(python), "-I", "-c", code], text=True).strip()


def test_life_of_a_toolchain(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = make_wheel(tmp_path, "1.0"), make_wheel(tmp_path, "2.0")
    offer(monkeypatch, ("install", "--no-index", str(one)))
    first = toolchains.install("vllm")
    assert (first.version, first.device, first.packages["toyengine"]) == ("1.0", "cpu", "1.0")
    assert runs(first.python) == "1.0"
    assert toolchains.find("vllm") == first
    assert toolchains.install("vllm") == first  # what is pinned is there: nothing to do

    # An installation that was killed: its directory is there, no record names it.
    (cache / "toolchains" / "vllm" / "dead").mkdir()

    offer(monkeypatch, ("install", "--no-index", "no-such-package-of-anybody"))
    with pytest.raises(ToolchainError) as caught:
        toolchains.install("vllm")
    assert "no-such-package-of-anybody" in str(caught.value)
    log = cache / "logs" / "install-vllm.log"
    assert str(log) in str(caught.value)
    assert "no-such-package-of-anybody" in log.read_text()
    assert toolchains.find("vllm") == first
    assert runs(first.python) == "1.0"  # the one that worked still does

    offer(monkeypatch, ("install", "--no-index", str(two)))  # the pins changed
    second = toolchains.install("vllm")
    assert runs(second.python) == "2.0"
    assert [p.name for p in (cache / "toolchains" / "vllm").iterdir()] == [second.directory.name]

    toolchains.remove("vllm")
    assert not second.directory.exists()
    with pytest.raises(ToolchainError, match="nothing to remove"):
        toolchains.remove("vllm")
    assert "toyengine" not in capfd.readouterr().out  # results only on stdout


def test_a_toolchain_that_does_not_import_is_not_installed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path, "1.0")
    offer(monkeypatch, ("install", "--no-index", str(wheel)), module="otherengine")
    with pytest.raises(ToolchainError, match="ModuleNotFoundError: No module named 'otherengine'"):
        toolchains.install("vllm")
    with pytest.raises(ToolchainError):
        toolchains.find("vllm")
    assert list((cache / "toolchains" / "vllm").glob("*")) == []


def make_sdist(directory: Path, files: tuple[str, ...]) -> Path:
    """A package with llama.cpp's files in it, built by a backend of its own: pip asks for no more
    than its metadata."""
    backend = """
import pathlib
def prepare_metadata_for_build_wheel(directory, settings=None):
    info = pathlib.Path(directory, "toy-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: toy\\nVersion: 1.0\\n")
    return info.name
"""
    project = 'build-system = {requires = [], build-backend = "backend", backend-path = ["."]}'
    contents = {"pyproject.toml": project, "backend.py": backend, "PKG-INFO": "Name: toy\n"}
    contents |= {f"vendor/llama.cpp/{name}": name for name in files}
    sdist = directory / "toy-1.0.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name, text in contents.items():
            member = tarfile.TarInfo(f"toy-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return sdist


def test_llama_cpps_converter_is_files_alone(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "packages"))
    name = "llamacpp-converter"
    real = toolchains.RECIPES[name]["cpu"]
    assert real.pip == (("download", "--no-deps", "--no-binary", "llama-cpp-python",
                         f"llama-cpp-python=={version('llama-cpp-python')}"),)  # fmt: skip

    def offer_files(*files: str) -> None:
        pip = (("download", "--no-deps", "--no-index", str(make_sdist(tmp_path, files))),)
        recipe = Recipe("cpu", "", pip, real.files)
        monkeypatch.setitem(toolchains.RECIPES, name, {"cpu": recipe, "cuda": recipe})

    offer_files("src/llama.cpp")
    with pytest.raises(ToolchainError, match=r"installation failed: no convert_hf_to_gguf\.py"):
        toolchains.install(name)
    offer_files("convert_hf_to_gguf.py", "conversion/base.py", "src/llama.cpp", "models/a.gguf")
    installed = toolchains.install(name)
    assert installed == toolchains.find(name)
    found = {str(p.relative_to(installed.directory)) for p in installed.directory.rglob("*.*")}
    assert found == {"convert_hf_to_gguf.py", "conversion/base.py"}
    monkeypatch.delenv("QUANTKIT_LLAMA_CPP", raising=False)
    converter = llama_cpp_converter.available()
    assert converter is not None
    assert converter.directory == installed.directory
    (installed.directory / "convert_hf_to_gguf.py").unlink()
    assert llama_cpp_converter.available() is None


def test_the_converter_that_make_built_counts_without_an_installation(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUANTKIT_LLAMA_CPP", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert llama_cpp_converter.available() is None
    built = tmp_path / "llama_cpp" / "converter"
    built.mkdir(parents=True)
    (built / "convert_hf_to_gguf.py").touch()
    library = version("llama-cpp-python")
    assert toolchains.find("llamacpp-converter").directory == built
    assert toolchains.install("llamacpp-converter").directory == built  # nothing is downloaded
    assert llama_cpp_converter.available() == llama_cpp_converter.Converter(
        built, f"llama-cpp-python {library}"
    )
    row = {row.name: row for row in toolchains.listing()}["llamacpp-converter"]
    assert (row.version, row.path, row.own) == (library, built, False)


def test_find_names_the_command_that_installs(cache: Path) -> None:
    with pytest.raises(ToolchainError) as caught:
        toolchains.find("vllm")
    assert str(caught.value) == "vllm: not installed; run: quantkit engines install vllm"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vlm", f"vlm: unknown toolchain; there is {', '.join(RECIPES)}; did you mean 'vllm'?"),
        ("llamacpp", "llamacpp: is part of quantkit's own environment"),
    ],
)
def test_what_cannot_be_installed(cache: Path, name: str, message: str) -> None:
    with pytest.raises(ToolchainError) as caught:
        toolchains.install(name)
    assert str(caught.value).startswith(message)


def test_one_installation_at_a_time(cache: Path) -> None:
    (cache / "toolchains").mkdir(parents=True)
    with (cache / "toolchains" / "vllm.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ToolchainError, match="another quantkit"):
            toolchains.install("vllm")


def test_listing_names_every_engine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.registry import ENGINES, PRODUCERS

    rows = {row.name: row for row in toolchains.listing()}
    assert list(rows) == [*ENGINES, *PRODUCERS, "llamacpp-converter"]
    assert rows["transformers"].version is not None
    assert rows["vllm"].version is None
    assert rows["vllm"].install == "quantkit engines install vllm"
    monkeypatch.setenv("QUANTKIT_LLAMA_SERVER", "/bin/sh")
    rows = {row.name: row for row in toolchains.listing()}
    assert rows["llamacpp"].path == Path("/bin/sh")


def test_a_damaged_record_counts_as_not_installed(cache: Path) -> None:
    (cache / "toolchains").mkdir(parents=True)
    (cache / "toolchains" / "vllm.json").write_text('{"name": "vllm"')
    with pytest.raises(ToolchainError, match="run: quantkit engines install vllm"):
        toolchains.find("vllm")


def program(path: Path, script: str) -> Path:
    """An executable that answers as ``script`` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def python_with_vllm(path: Path, device: str = "cuda") -> Path:
    return program(path, f"""echo 'INFO loading'; echo 'vllm: ["0.99.1", "{device}"]'""")


def test_own_vllm_is_used_in_the_place_of_the_installed_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, ("install", "--no-index", str(make_wheel(tmp_path, "1.0"))))
    installed = toolchains.install("vllm")
    python = python_with_vllm(tmp_path / "theirs" / "bin" / "python")
    own.use("vllm", python)
    found = toolchains.find("vllm")
    assert (found.version, found.device, found.python) == ("0.99.1", "cuda", python)
    assert toolchains.install("vllm") == found  # nothing is installed without need
    rows = {row.name: row for row in toolchains.listing()}
    assert (rows["vllm"].version, rows["vllm"].own) == ("0.99.1", True)

    toolchains.remove("vllm")  # forgets it, and deletes nothing of the user's
    assert python.exists()
    assert toolchains.find("vllm") == installed
    assert not toolchains.listing()[2].own

    own.use("vllm", python)
    assert toolchains.install("vllm", force=True).version == "1.0"
    assert toolchains.find("vllm").version == "1.0"


def test_own_engine_named_by_a_variable_is_stronger_than_the_record(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = python_with_vllm(tmp_path / "a" / "python")
    other = python_with_vllm(tmp_path / "b" / "python", "cpu")
    own.use("vllm", recorded)
    monkeypatch.setenv("QUANTKIT_VLLM", str(other))
    assert toolchains.find("vllm").python == other
    assert toolchains.find("vllm").device == "cpu"
    monkeypatch.setenv("QUANTKIT_VLLM", str(tmp_path / "none"))
    with pytest.raises(ToolchainError, match=r"QUANTKIT_VLLM: .*none: not a program"):
        toolchains.find("vllm")
    monkeypatch.delenv("QUANTKIT_VLLM")
    recorded.unlink()
    with pytest.raises(ToolchainError, match=r"vllm, named by `engines use` .*: not a program"):
        toolchains.find("vllm")  # and no other is taken in silence


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo No module named vllm; exit 1", "does not run: No module named vllm"),
        ("exit 3", "does not run: exit code 3"),
        ("echo hello", "does not say vLLM's version"),
        ("""echo 'vllm: ["0.99.1", "tpu"]'""", "computes on tpu; quantkit runs cpu and cuda"),
    ],
)
def test_own_vllm_that_is_none(tmp_path: Path, cache: Path, script: str, message: str) -> None:
    with pytest.raises(ToolchainError, match=message):
        own.use("vllm", program(tmp_path / "python", script))
    assert own.named("vllm") is None


def test_own_engine_is_a_program_of_a_known_engine(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ToolchainError, match="not a program that can be run"):
        own.use("vllm", tmp_path)
    with pytest.raises(ToolchainError, match="takes llamacpp or vllm"):
        own.use("auto-round", Path("/bin/sh"))


@pytest.mark.parametrize(
    ("listed", "device"),
    [
        ("  CUDA0: NVIDIA H100 (80000 MiB, 79000 MiB free)", "cuda"),
        ("  MTL0: Apple M4 (16000 MiB, 16000 MiB free)", "metal"),
        ("  Vulkan0: Radeon (8000 MiB, 7000 MiB free)", "vulkan"),
        ("  (none)", "cpu"),
    ],
)
def test_own_llama_server_says_its_version_and_device(
    tmp_path: Path, cache: Path, listed: str, device: str
) -> None:
    from quantkit.engines.llamacpp import LlamaCpp
    from quantkit.toolchains.llama_programs import find_llama_server

    script = f"""
case $1 in
--version) echo 'version: 6789 (abcdef0)' >&2; echo 'built with GNU 12' >&2 ;;
--list-devices) echo 'Available devices:'; echo '{listed}' ;;
esac"""
    library = LlamaCpp().version()
    server = program(tmp_path / "llama-server", script)
    found = own.use("llamacpp", server)
    assert (found.version, found.device) == ("6789 (abcdef0)", device)
    assert find_llama_server().path == server
    assert LlamaCpp().version() == f"{library} (llama-server 6789 (abcdef0))"
    toolchains.remove("llamacpp")
    assert find_llama_server().path != server
    assert LlamaCpp().version() == library
