"""What vLLM runs as one, and what it refuses or would compute wrongly: said before the work."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from quantkit.engines.vllm.architectures import USUAL, Fusion, has, known_of, needs
from quantkit.engines.vllm.unsupported import check_architecture, check_bits
from quantkit.errors import IncompatibleVariant, RecipeError
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import GroupScheme, Spec
from quantkit.producers.convert import plan
from quantkit.producers.linear_options import dynamic, fused_linears
from quantkit.toolchains import Toolchain
from tests.integration.small_decoders import make

DELTA = "model.layers.0.linear_attn"
KEYS, QUERIES = "kv_a_proj_with_mqa", "q_a_proj"


def test_what_is_run_as_one_is_by_architecture() -> None:
    assert Fusion.of("LlamaForCausalLM").parts == USUAL
    assert Fusion.of("OlmoForCausalLM").parts == USUAL  # by transformers' code
    assert Fusion.of("NeverHeardOf").parts == USUAL
    assert Fusion.of("Qwen3_5ForCausalLM").parts["in_proj_qkvz"] == ("in_proj_qkv", "in_proj_z")
    assert Fusion.of("Lfm2ForCausalLM").parts["w13"] == ("w1", "w3")
    latents = ("q_a_proj", "kv_a_proj_with_mqa")
    assert Fusion.of("DeepseekV3ForCausalLM").parts["fused_qkv_a_proj"] == latents


def test_a_linear_belongs_to_what_has_most_of_the_linears_beside_it() -> None:
    parts = Fusion.of("OlmoHybridForCausalLM").parts
    full = [f"a.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    gated = [f"a.linear_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "g_proj")]
    alone = ["a.o_proj", "a.mlp.experts.0.up_proj", "a.mlp.experts.1.up_proj"]
    assert fused_linears([*full, *gated, *alone], parts) == {
        "a.self_attn.qkv_proj": full,
        "a.linear_attn.in_proj_qkvg": gated,
        "a.o_proj": ["a.o_proj"],
        "a.mlp.experts": alone[1:],
    }


@pytest.mark.parametrize(
    ("architecture", "linears", "misnamed"),
    [
        ("LlamaForCausalLM", {"mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj"}, []),
        ("Phi3ForCausalLM", {"mlp.gate_up_proj", "self_attn.qkv_proj"}, []),
        # Fused, and not named where vLLM asks.
        ("StableLmForCausalLM", {"self_attn.q_proj", "o_proj"}, ["self_attn.qkv_proj"]),
        # Stored as one, and taken to be stored in parts.
        ("Glm4ForCausalLM", {"mlp.gate_up_proj"}, ["mlp.gate_proj", "mlp.up_proj"]),
        # Called otherwise where vLLM asks.
        ("GraniteMoeHybridForCausalLM", {"mamba.out_proj"}, ["mixer.out_proj"]),
    ],
)
def test_names_that_vllm_asks_for_and_does_not_find(
    architecture: str, linears: set[str], misnamed: list[str]
) -> None:
    assert Fusion.of(architecture).misnamed(linears) == misnamed


@pytest.mark.parametrize(
    ("architecture", "stored", "asked"),
    [
        ("Lfm2ForCausalLM", "model.layers.0.conv.in_proj", "model.layers.0.short_conv.in_proj"),
        (
            "Gemma3ForConditionalGeneration",
            "model.language_model.layers.0.mlp.down_proj",
            "language_model.model.layers.0.mlp.down_proj",
        ),
        ("LlamaForCausalLM", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),
    ],
)
def test_a_scheme_of_its_own_is_under_the_name_that_vllm_asks_for(
    architecture: str, stored: str, asked: str
) -> None:
    fusion, eight = Fusion.of(architecture), GroupScheme(8, 32)
    assert fusion.asked_as(stored) == asked
    (key,) = dynamic(GroupScheme(4, 32), {stored: eight}, [stored], fusion)
    assert re.match(key.removeprefix("+:"), stored)
    assert re.match(key.removeprefix("+:"), asked)


def test_parts_of_a_fused_projection_of_linear_attention_need_one_scheme(tmp_path: Path) -> None:
    source = Checkpoint.open(make("qwen3_5_text", tmp_path / "source"))
    entry = {"spec": "gptq:w4g32", "skip": r"in_proj_z"}
    with pytest.raises(RecipeError, match=rf"one scheme: {DELTA}.in_proj_qkv: w4g32, .*skipped"):
        plan(source, Spec.of_entry(entry))
    both = {"spec": "gptq:w4g32", "skip": r"in_proj_(z|qkv)$"}
    assert plan(source, Spec.of_entry(both)).notes


def test_what_is_run_as_one_with_a_linear_that_no_kernel_takes_is_left_too(tmp_path: Path) -> None:
    """DeepSeek's latents: 64 channels of queries, and 64 + 16 of keys, values and rotation."""
    source = Checkpoint.open(make("deepseek_v3", tmp_path / "source"))
    narrow, beside = (
        note for note in plan(source, Spec.parse("awq:w4g32")).notes if "not quantized, as" in note
    )
    layers = [f"model.layers.{index}.self_attn" for index in (0, 1)]
    keys, queries = ([f"{one}.{name}" for one in layers] for name in (KEYS, QUERIES))
    assert narrow == (
        f"2 linears are not quantized, as no kernel takes their widths: {', '.join(keys)}"
    )
    assert beside == (
        f"2 linears are not quantized, as engines run them as one with such: {', '.join(queries)}"
    )


def test_what_vllm_misreads_is_left(tmp_path: Path) -> None:
    """It turns the rows of Llama 4's queries and keys around only where they are not packed."""
    source = Checkpoint.open(make("llama4_text", tmp_path / "source"))
    notes = plan(source, Spec.parse("gptq:w4g32")).notes
    (note,) = (one for one in notes if "wrongly" in one)
    first = "model.layers.0.self_attn"
    assert note.endswith(
        "linears are not quantized, as vLLM would compute wrongly from them: "
        f"{first}.q_proj, {first}.k_proj, {first}.v_proj …"
    )


def test_the_plan_says_what_vllm_does_not_have_or_read() -> None:
    assert not has("XGLMForCausalLM")
    assert known_of("XGLMForCausalLM", "gptq") == [
        "vLLM 0.32.0 does not have XGLMForCausalLM: it will not serve this variant"
    ]
    (note,) = known_of("GptOssForCausalLM", "awq")
    assert note.startswith("vLLM 0.32.0 cannot serve awq of GptOssForCausalLM: it leaves out")
    assert known_of("LlamaForCausalLM", "awq") == []
    (note,) = known_of("Qwen3_5ForCausalLM", "awq")
    assert note == "vLLM for the CPU does not load Qwen3_5ForCausalLM without torchvision"


def _toolchain(version: str, packages: dict[str, str]) -> Toolchain:
    return Toolchain(
        name="vllm", version=version, device="cpu", directory=Path("/"), pip=(), packages=packages
    )


def test_a_model_that_vllm_cannot_load_is_refused_before_it_starts(tiny_llama: Path) -> None:
    model, packages = Checkpoint.open(tiny_llama), {"torch": "2.13.0"}

    def check(architecture: str, version: str = "0.32.0", **more: str) -> None:
        config = {"architectures": [architecture]}
        check_architecture(config, model, _toolchain(version, packages | more))

    check("LlamaForCausalLM")
    check("GptOssForCausalLM")  # as it is, not as a variant
    with pytest.raises(IncompatibleVariant, match=r"0\.32\.0 does not have XGLMForCausalLM"):
        check("XGLMForCausalLM")
    check("XGLMForCausalLM", version="0.33.0")
    with pytest.raises(IncompatibleVariant, match="no kernel for MiniMaxM2ForCausalLM on a CPU"):
        check("MiniMaxM2ForCausalLM")
    assert needs("Qwen3_5ForCausalLM") == "torchvision"
    with pytest.raises(IncompatibleVariant, match="needs torchvision for Qwen3_5ForCausalLM"):
        check("Qwen3_5ForCausalLM")
    check("Qwen3_5ForCausalLM", torchvision="0.28.0+cpu")


@pytest.mark.parametrize(
    ("bits", "dynamic", "refused"),
    [
        (4, {}, False),
        (8, {}, True),
        (4, {"+:^a$": {"bits": 8, "group_size": 32}}, True),
        (4, {"+:^a$": {"bits": 4, "group_size": 64}, "-:^b$": {}}, False),
    ],
)
def test_a_cpu_has_no_kernel_for_eight_bits(
    bits: int, dynamic: dict[str, dict[str, int]], refused: bool, tiny_llama: Path
) -> None:
    found = {"quant_method": "gptq", "bits": bits, "dynamic": dynamic}
    outcome = (
        pytest.raises(IncompatibleVariant, match="8 bits on a CPU") if refused else nullcontext()
    )
    with outcome:
        check_bits({"quantization_config": found}, Checkpoint.open(tiny_llama))
