"""Packages as producers: what they are given, what is taken over, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pydantic import BaseModel

from quantkit import toolchains
from quantkit.cli.spec_arguments import by_producer
from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.texts import load_text
from quantkit.errors import ConversionError, QuantkitError, RecipeError, ToolchainError
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant, verify
from quantkit.producers import convert as converting
from quantkit.producers import load_producer, packages
from quantkit.producers.convert import convert, plan
from quantkit.producers.package import Package, Schemes
from quantkit.producers.staging import as_transformers_4
from quantkit.runs.recipe import Recipe
from quantkit.toolchains import Toolchain
from tests.plain_weights import plain_weights


class _Options(BaseModel):
    fail: str = ""


class StandIn(Package):
    name = "auto-round"
    script = str(Path(__file__).with_name("stand_in_producer.py"))
    schemes: ClassVar[dict[str, Schemes]] = {"gptq": ((4,), (64,))}
    options = _Options


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A toolchain that is this very environment, and the stand-in as its producer."""
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path_factory.mktemp("home")))
    toolchain = Toolchain(
        name="auto-round",
        version="0.0.1",
        device="cpu",
        directory=Path(sys.prefix),
        pip=(),
        packages={"torch": "2", "transformers": "5", "numpy": "1"},
    )
    monkeypatch.setattr(toolchains, "find", lambda name: toolchain)
    monkeypatch.setattr(converting, "load_producer", lambda spec: StandIn())


@pytest.fixture(scope="module")
def calibration(tiny_llama: Path) -> Calibration:
    tokenizer = Checkpoint.open(tiny_llama).tokenizer
    text = load_text("pydoc:calibration")
    return calibrate(text, tokenizer, samples=3, sequence_length=16, seed=5)


def make(source: Path, calibration: Calibration, out: Path, **options: str) -> Variant:
    spec = Spec.parse("gptq:w4g64").by("auto-round").having(options)
    return convert(Checkpoint.open(source), spec, calibration, out)


def test_a_variant_like_any_other(
    tiny_llama: Path, calibration: Calibration, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_llama.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "modeling_own.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_text("pickle")
    variant = make(source, calibration, tmp_path / "out")
    assert variant.id == "gptq-w4g64-auto-round"
    assert [file.name for file in (tmp_path / "out").iterdir()] == [variant.id]
    manifest = variant.manifest
    assert manifest is not None
    assert verify(variant) == []
    # What the package was given.
    assert manifest.spec["saw"] == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert manifest.spec["ids"] == calibration.ids.tolist()
    assert manifest.spec["job"] == {
        "format": "gptq", "bits": 4, "group_size": 64, "seed": 5, "device": "cpu",
    }  # fmt: skip
    # What is said of it.
    assert manifest.calibration == calibration.record
    assert manifest.spec["calibration_given"] == "3 lists"
    assert (manifest.spec["producer"], manifest.spec["fail"]) == ("auto-round", "")
    tools = {key: manifest.tools[key] for key in ("auto-round", "torch", "transformers")}
    assert tools == {"auto-round": "0.0.1", "torch": "2", "transformers": "5"}
    assert manifest.convert.peak_rss_bytes > 50e6
    assert manifest.bits_per_weight_quantized == pytest.approx(
        # A word's eighth, and of each group of 64 a half and a zero; an index for each input.
        4 + 20 / 64 + 32 * (5 * 256 + 256 + 512) / (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256),
        rel=0.01,
    )
    # What was taken over: weights and quantization_config, nothing else.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (variant.path / name).read_bytes() == (tiny_llama / name).read_bytes()
    config = json.loads((variant.path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert quantization == {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
    assert config == json.loads((tiny_llama / "config.json").read_text())
    plain = dict(plain_weights(variant.path))
    checkpoint = Checkpoint.open(tiny_llama)
    weight = checkpoint.read("model.layers.1.mlp.up_proj.weight").float()
    groups = weight.view(512, -1, 64)
    scales = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
    rounded = ((groups / scales).round().clamp(-8, 7) * scales).view(512, 256)
    assert torch.equal(plain["model.layers.1.mlp.up_proj.weight"], rounded)


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("error", r"failed \(exit code 1\): ValueError: the Hessian is not positive definite; its"),
        ("pickle", "asks for code of its own to be run, or for a pickle"),
        ("nan", r"scales of model\.layers\.0\.self_attn\.q_proj are not finite"),
    ],
)
def test_what_fails_says_why_and_leaves_nothing(
    fail: str, message: str, tiny_llama: Path, calibration: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=message):
        make(tiny_llama, calibration, tmp_path, fail=fail)
    assert list(tmp_path.iterdir()) == []


def test_plan_refuses_before_any_work(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Toolchain:
        raise ToolchainError(f"{name}: not installed; run: quantkit engines install {name}")

    monkeypatch.undo()
    monkeypatch.setattr(toolchains, "find", missing)
    monkeypatch.setattr("quantkit.producers.package.gpu", lambda: None)
    source = Checkpoint.open(tiny_llama)
    cases = [
        ("gptq:w4g64", "auto-gptq", {}, r"auto-gptq computes on CUDA only, and there is no NVIDIA"),
        ("gptq:w4g64", "autoawq", {}, r"autoawq makes awq; leave out `producer`"),
        ("gptq:w4g64", "auto-round", {}, r"run: quantkit engines install auto-round"),
        ("gptq:w4g64", "auto-round", {"itres": 1}, r"takes iters, .*did you mean 'iters'\?"),
        ("gptq:w4g64", "auto-round", {"iters": -1}, r"iters: Input should be greater than or"),
        ("gptq:w4g64", "auto-round", {"iters": "many"}, r"iters: Input should be a valid integer"),
        ("gptq:w3g64", "auto-round", {}, r"unknown scheme 'w3g64'"),
    ]
    for spec, producer, options, message in cases:
        with pytest.raises(QuantkitError, match=message):
            plan(source, Spec.parse(spec).by(producer).having(options))


def test_plan_resolves_the_options_that_tell_one_variant_from_another(tiny_llama: Path) -> None:
    spec = Spec.of_entry({"spec": "awq:w4g64", "producer": "auto-round", "iters": 50})
    source = Checkpoint.open(tiny_llama)
    planned = packages.AutoRound().plan(source, spec)
    assert planned.options == {"iters": 50, "batch_size": 8, "lr": None}
    assert (
        planned.bytes
        == load_producer(Spec.parse("awq:w4g64")).plan(source, Spec.parse("awq:w4g64")).bytes
    )


def test_an_entry_of_a_recipe_names_its_producer() -> None:
    entries = ["gptq:w4g64", {"spec": "gptq:w4g64", "producer": "auto-round", "iters": 0}]
    specs = Recipe(name="r", source="s", convert=entries).specs
    assert [spec.directory for spec in specs] == ["gptq-w4g64", "gptq-w4g64-auto-round"]
    assert [str(spec) for spec in specs] == ["gptq:w4g64", "gptq:w4g64 by auto-round"]
    with pytest.raises(
        ValueError, match=r"unknown producer 'autoround'.*did you mean 'auto-round'"
    ):
        Recipe(name="r", source="s", convert=[{"spec": "awq:w4g64", "producer": "autoround"}])


def test_the_command_lines_producer_is_not_for_gguf() -> None:
    specs = [Spec.parse("gguf:Q8_0"), Spec.parse("gptq:w4g64")]
    made = by_producer(specs, "auto-round", ["iters=50", "lr=0.5"])
    assert made[0] == specs[0]
    assert made[1] == specs[1].by("auto-round").having({"iters": 50, "lr": 0.5})
    with pytest.raises(RecipeError, match=r"name the --producer it is for"):
        by_producer(specs, None, ["iters=50"])
    with pytest.raises(RecipeError, match=r"expected NAME=VALUE, such as iters=50"):
        by_producer(specs, "auto-round", ["iters"])


def test_configurations_as_transformers_4_reads_them() -> None:
    five = {
        "dtype": "bfloat16",
        "hidden_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    }
    assert as_transformers_4(five) == {
        "torch_dtype": "bfloat16",
        "hidden_size": 64,
        "rope_theta": 100000.0,
        "rope_scaling": None,
    }
    assert "rope_parameters" in five
    scaled = {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
    }
    assert as_transformers_4(scaled) == {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    }
    four = {"torch_dtype": "float16", "rope_theta": 1e6, "rope_scaling": None}
    assert as_transformers_4(four) == four
    with pytest.raises(ConversionError, match="per kind of layer"):
        as_transformers_4({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}})
