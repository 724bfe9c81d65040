"""A GPU that several engines share: what each is given of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.engines import vllm
from quantkit.engines.llamacpp import server as llama_server
from quantkit.engines.server import ServeOptions, ServerCommand
from quantkit.engines.vllm import VLLM
from quantkit.errors import EngineError, RecipeError
from quantkit.models.engine_config import Option
from quantkit.models.variant import Variant
from quantkit.system import cards as system_cards
from quantkit.system.cards import Card, read
from quantkit.toolchains import Toolchain
from quantkit.toolchains.llama_programs import Program
from tests.unit.test_engine_commands import gguf, value

GiB = 1 << 30
TOKEN = 2 * 32 * 8 * 128 * 2
"""Bytes of keys and values: 32 layers, 8 heads of 128, bf16."""
BLOCK = 128
TOLD = """\
GPU-aa11, 81559 MiB, 80000 MiB
GPU-bb22, 81559 MiB, 1000 MiB
GPU-cc33, 24576 MiB, 24000 MiB
"""
FIRST, SECOND, THIRD = (
    Card(81559 << 20, 80000 << 20), Card(81559 << 20, 1000 << 20), Card(24576 << 20, 24000 << 20),
)  # fmt: skip


@pytest.mark.parametrize(
    ("told", "visible", "found"),
    [
        (TOLD, None, [FIRST, SECOND, THIRD]),
        (TOLD, "2,0", [THIRD, FIRST]),
        (TOLD, "GPU-bb", [SECOND]),
        (TOLD, "1,7,0", [SECOND]),
        (TOLD, "", []),
        (TOLD, "-1", []),
        ("GPU-aa11, [N/A], [N/A]\n", None, []),
        ("", None, []),
        ("NVIDIA-SMI has failed\n", None, []),
    ],
)
def test_cards_as_nvidia_smi_tells(told: str, visible: str | None, found: list[Card]) -> None:
    assert read(told, visible) == found


def test_cards_without_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert system_cards.cards() == []
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{TOLD}'\n")
    program.chmod(0o755)
    assert system_cards.cards() == [FIRST, SECOND, THIRD]


@pytest.fixture
def model(tmp_path: Path) -> Variant:
    """An 8 B of 16 GiB, of which only the sizes are there."""
    (tmp_path / "config.json").write_text(
        json.dumps({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64},
        })
    )  # fmt: skip
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(16 * GiB)  # a hole
    return Variant("m", tmp_path, "awq", "w4g64", None)


def command(
    monkeypatch: pytest.MonkeyPatch,
    model: Variant,
    found: list[Card],
    options: dict[str, Option] | None = None,
    **load: int,
) -> ServerCommand:
    toolchain = Toolchain.model_validate(
        {"name": "vllm", "version": "0", "device": "cuda", "directory": "/v", "pip": [],
         "packages": {}}
    )  # fmt: skip
    monkeypatch.setattr(vllm.toolchains, "find", lambda name: toolchain)
    monkeypatch.setattr(vllm, "cards", lambda: found)
    return VLLM(options or {}).server(model, ServeOptions(port=1, **load))


def test_vllm_takes_what_the_model_needs(model: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(80 * GiB, 80 * GiB)
    found = command(monkeypatch, model, [card], context=1000, slots=4)
    # Each request in whole blocks of 128, and one block that vLLM keeps.
    cache = (4 * 8 + 1) * BLOCK * TOKEN
    assert value(found, "--kv-cache-memory-bytes") == str(cache)
    share = float(value(found, "--gpu-memory-utilization"))
    assert share == pytest.approx((18 * GiB + cache) / card.total, abs=1e-4)


def test_two_engines_fit_on_one_card(model: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second asks for no more than the first has left."""
    shares = []
    for free in (80, 55):
        card = Card(80 * GiB, free * GiB)
        found = command(monkeypatch, model, [card], context=4096, slots=8)
        shares.append(float(value(found, "--gpu-memory-utilization")))
    assert shares[0] == shares[1] < 55 / 80


def test_too_little_is_free(model: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for one request of full context."""
    with pytest.raises(EngineError) as caught:
        command(monkeypatch, model, [Card(80 * GiB, 19 * GiB)], context=4096, slots=8)
    assert str(caught.value) == (
        "m: vllm needs 19.52 GiB of a GPU (16.00 GiB of weights, 0.52 GiB of cache, 3.00 GiB "
        "beside them), and 19.00 GiB of 80.00 GiB are free; lower the context, or stop what else "
        "runs on it"
    )


def test_a_smaller_cache_where_less_is_free(
    model: Variant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="quantkit"):
        found = command(monkeypatch, model, [Card(80 * GiB, 20 * GiB)], context=4096, slots=8)
    assert value(found, "--kv-cache-memory-bytes") == str(1 * GiB)
    assert caplog.messages == [
        "m: 1.00 GiB of the GPU are free for vllm's cache, and 8 requests can take 4.02 GiB: some "
        "will wait"
    ]


def test_without_a_context_slots_have_room_as_far_as_it_is_free(
    model: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cache(slots: int, free: int) -> int:
        found = command(monkeypatch, model, [Card(80 * GiB, free * GiB)], slots=slots)
        return int(value(found, "--kv-cache-memory-bytes"))

    longest = (131072 + BLOCK) * TOKEN
    assert cache(4, 80) == longest
    assert cache(128, 80) == (128 * 2048 + BLOCK) * TOKEN
    assert cache(512, 80) == (80 - 16 - 3) * GiB
    with pytest.raises(EngineError, match="are free"):
        cache(4, 30)


def test_parallel_parts_are_planned_for_each_card(
    model: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the GPUs that it uses the fullest decides; four of eight heads of keys each."""
    found = [Card(80 * GiB, 30 * GiB), Card(80 * GiB, 15 * GiB), Card(80 * GiB, 0)]
    two = command(monkeypatch, model, found, {"tensor_parallel_size": "2"}, context=4096, slots=8)
    assert int(value(two, "--kv-cache-memory-bytes")) == (8 * 32 + 1) * BLOCK * TOKEN // 2
    assert value(two, "--tensor-parallel-size") == "2"
    many = command(
        monkeypatch, model, found[:1], {"tensor_parallel_size": 16}, context=4096, slots=8
    )
    assert int(value(many, "--kv-cache-memory-bytes")) == (8 * 32 + 1) * BLOCK * TOKEN // 8
    with pytest.raises(EngineError, match=r"0\.00 GiB of 80\.00 GiB are free"):
        command(monkeypatch, model, found, {"pipeline_parallel_size": 3}, context=4096, slots=8)
    with pytest.raises(RecipeError, match="expected whole numbers"):
        command(monkeypatch, model, found, {"tensor_parallel_size": "all"}, context=4096, slots=8)


def test_vllm_divides_the_share_of_a_recurrent_model(
    model: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = model.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"linear_num_value_heads": 32}))
    found = command(monkeypatch, model, [Card(80 * GiB, 80 * GiB)], context=1000, slots=64)
    assert "--kv-cache-memory-bytes" not in found.argv
    planned = 18 * GiB + (64 * 8 + 1) * BLOCK * TOKEN + 64 * (64 << 20)
    share = float(value(found, "--gpu-memory-utilization"))
    assert share == pytest.approx(planned / (80 * GiB), abs=1e-4)


@pytest.mark.parametrize("option", ["gpu_memory_utilization", "kv_cache_memory_bytes"])
def test_what_the_user_decides_stays(
    option: str, model: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = command(monkeypatch, model, [Card(80 * GiB, 0)], {option: 1}, context=4096, slots=8)
    memory = [word for word in found.argv if "memory" in word]
    assert memory == ["--" + option.replace("_", "-")]


def test_llama_server_puts_all_layers_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def environment() -> dict[str, str]:
        program = Program(Path("/x/llama-server"))
        options = ServeOptions(port=1)
        return dict(llama_server.server_command(program, gguf(tmp_path), options).env)

    whole = {"LLAMA_ARG_N_GPU_LAYERS": "999", "LLAMA_ARG_FIT": "off"}
    monkeypatch.setattr(llama_server, "gpu", lambda: "NVIDIA H100")
    assert whole.items() <= environment().items()
    monkeypatch.setattr(llama_server, "gpu", lambda: None)
    assert not whole.keys() & environment().keys()


def test_llama_server_knows_these_variables() -> None:
    """A misspelt one would be ignored: the help of the server that is installed names them."""
    from quantkit.toolchains.llama_programs import find_llama_server
    from quantkit.toolchains.own import _output

    server = find_llama_server()
    said = _output("llamacpp", server.path, "--help", env=server.env)
    for variable in ("LLAMA_ARG_N_GPU_LAYERS", "LLAMA_ARG_FIT"):
        assert f"(env: {variable})" in said
