"""Checkpoints as people have them: each is read right, or refused in one line."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.engines.transformers.weights import load
from quantkit.formats.detect import open_variant
from quantkit.formats.packed import bits_of
from quantkit.ledger import Ledger
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from quantkit.runs import pipeline
from quantkit.runs.recipe import Recipe
from tests.command_line import Command, of_fixtures
from tests.packed_checkpoints import LINEARS, as_awq, as_compressed, as_gptq, draw, write

LINEAR = "model.layers.0.mlp.up_proj.weight"
TEXT = ("--text", "pydoc:evaluation", "--windows", "1", "--context", "64")


@pytest.fixture
def quantkit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return of_fixtures(monkeypatch, capfd)


@pytest.fixture
def refused(quantkit: Command) -> Callable[..., str]:
    """Run a command that ends with one line on stderr; that line."""

    def run(*arguments: str | Path, code: int = 2) -> str:
        ended = quantkit(*arguments)
        assert ended.code == code, ended
        assert ended.err.startswith("quantkit: "), ended
        assert "a bug in quantkit" not in ended.err
        assert len(ended.err.strip().splitlines()) == 1, ended.err
        return ended.error

    return run


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit(path: Path, **settings: Any) -> Path:
    """Set keys of a JSON file, or remove them (``...``)."""
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return path.parent


def convert_to(copy: Path, spec: str) -> tuple[str | Path, ...]:
    return "convert", copy, "--to", spec, "--out", copy.parent / "out"


def recipe(copy: Path, *entries: Any) -> tuple[str | Path, ...]:
    """A plan of these entries; without any, of what reads the most of a config."""
    asked = run_of(copy, *(entries or ("gguf:Q8_0", "gptq:w4g64")))
    file = copy.parent / "recipe.yaml"
    file.write_text(asked.model_dump_json())  # which is YAML too
    return "plan", file


def run_of(source: Path, *entries: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "source": str(source),
            "convert": [*entries],
            "evaluate": {"texts": ["pydoc:evaluation"], "windows": 1, "context": 64},
            "bench": None,
        }
    )


# Dtypes


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int32, "I32"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
        (torch.uint8, "U8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
    ],
)
def test_weights_that_are_no_values_of_themselves_are_told_and_refused(
    copy: Path, quantkit: Command, refused: Callable[..., str], dtype: torch.dtype, name: str
) -> None:
    state = load_file(copy / "model.safetensors")
    state = {key: t.to(dtype) if key.endswith("proj.weight") else t for key, t in state.items()}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    facts = quantkit("inspect", copy, "--json").json()
    assert facts["bytes"] == sum(tensor.nbytes for tensor in state.values())
    assert facts["dtype"] == name.lower()
    for spec in ("gguf:Q8_0", "gptq:w4g64", "awq:w4g64"):
        assert f"proj.weight is stored as {name}, weights are F64" in refused(
            *convert_to(copy, spec)
        )
    ended = quantkit("evaluate", copy, *TEXT)
    assert ended.code == 2
    assert f"is stored as {name}, and config.json does not say" in ended.error
    assert not (copy.parent / "out").exists()


def test_a_dtype_that_safetensors_does_not_have(copy: Path, refused: Callable[..., str]) -> None:
    described = {"x": {"dtype": "F3_E1M1", "shape": [2], "data_offsets": [0, 2]}}
    header = json.dumps(described).encode()
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"12")
    assert re.search(r"model\.safetensors: .*F3_E1M1", refused("inspect", copy))


def test_what_was_measured_is_kept_where_the_files_cannot_be_described(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = auto_gptq(tiny_llama, tmp_path / "theirs")

    def unknown(*_: Any) -> None:
        raise KeyError("F8_E4M3")

    monkeypatch.setattr("quantkit.runs.rows.load_format", unknown)
    reference, row = pipeline.run(
        run_of(tiny_llama, {"path": str(path)}), tmp_path / "run"
    ).variants
    assert reference.failed is None
    assert row.failed is not None
    assert (row.failed.stage, row.failed.error) == ("describe", "KeyError('F8_E4M3')")
    assert row.texts["pydoc:evaluation"].metrics["kld_mean"].value > 0
    assert "KeyError" in (tmp_path / "run" / "report.md").read_text()


def test_bits_of_a_packed_checkpoint_with_other_dtypes(tiny_llama: Path, tmp_path: Path) -> None:
    drawn = draw((256, 256), 4, 4)
    parts = as_compressed(drawn, 4, asymmetric=True)
    path = write(tiny_llama, tmp_path / "theirs", {"model.layers.0.self_attn.q_proj": parts}, {})
    state = load_file(path / "model.safetensors")
    state["k_scale"] = torch.zeros(8, dtype=torch.float8_e4m3fn)
    state["mask"] = torch.ones(2, 4, dtype=torch.bool)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint.open(tiny_llama)
    everything, _ = bits_of(Checkpoint.open(path).tensors, source)
    assert everything == sum(t.nbytes for t in state.values()) * 8 / source.parameters


# Settings of a quantization that are not in config.json


AUTO_GPTQ = {
    "bits": 4,
    "group_size": 64,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "gptq_model-4bit-64g",
}
AUTO_AWQ = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
SHAPES = {LINEARS[0]: (128, 256), LINEARS[1]: (256, 512)}


def auto_gptq(tiny_llama: Path, directory: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """As AutoGPTQ 0.4 saved; and the weights that its linears stand for."""
    drawn = {name: draw(shape, 4, shape[1] // 64) for name, shape in SHAPES.items()}
    parts = {name: as_gptq(d, 4, stored_less=1, g_idx=True) for name, d in drawn.items()}
    path = write(tiny_llama, directory, parts, {})
    edit(path / "config.json", quantization_config=...)
    (path / "model.safetensors").rename(path / "gptq_model-4bit-64g.safetensors")
    (path / "quantize_config.json").write_text(json.dumps(AUTO_GPTQ))
    return path, {f"{name}.weight": d.weight() for name, d in drawn.items()}


def test_auto_gptq_settings_are_read(tiny_llama: Path, tmp_path: Path, quantkit: Command) -> None:
    path, weights = auto_gptq(tiny_llama, tmp_path / "theirs")
    facts = quantkit("inspect", path, "--json").json()
    assert (facts["format"], facts["scheme"]) == ("gptq", "w4g64")
    assert facts["quantization_config"] == {"quant_method": "gptq", **AUTO_GPTQ}
    state = load(open_variant(path), torch.float32).state_dict()
    for name, weight in weights.items():
        assert torch.equal(state[name], weight)

    # The same numbers as with the settings in config.json, and other ones for other settings.
    ended = quantkit("evaluate", path, *TEXT, "--json").json()
    usual = Path(shutil.copytree(path, tmp_path / "usual"))
    (usual / "quantize_config.json").unlink()
    edit(usual / "config.json", quantization_config={"quant_method": "gptq", **AUTO_GPTQ})
    expected = quantkit("evaluate", usual, *TEXT, "--json").json()
    assert ended["models"]["theirs"] == expected["models"]["usual"]
    before = open_variant(path).sha256
    edit(path / "quantize_config.json", checkpoint_format="gptq_v2")
    assert open_variant(path).sha256 != before


def test_auto_gptq_as_an_entry_of_a_run(tiny_llama: Path, tmp_path: Path) -> None:
    path, _ = auto_gptq(tiny_llama, tmp_path / "theirs")
    _, row = pipeline.run(run_of(tiny_llama, {"path": str(path)}), tmp_path / "run").variants
    assert row.failed is None
    assert row.spec == "gptq:w4g64"
    assert row.texts["pydoc:evaluation"].metrics["kld_mean"].value > 0


def test_auto_awq_settings_are_read(tiny_llama: Path, tmp_path: Path, quantkit: Command) -> None:
    drawn = draw(SHAPES[LINEARS[0]], 4, 4)
    path = write(tiny_llama, tmp_path / "theirs", {LINEARS[0]: as_awq(drawn)}, {})
    edit(path / "config.json", quantization_config=...)
    (path / "quant_config.json").write_text(json.dumps(AUTO_AWQ))
    facts = quantkit("inspect", path, "--json").json()
    assert (facts["format"], facts["scheme"]) == ("awq", "w4g64")
    state = load(open_variant(path), torch.float32).state_dict()
    assert torch.equal(state[f"{LINEARS[0]}.weight"], drawn.weight())


def test_convert_says_that_the_source_is_packed_already(
    tiny_llama: Path, tmp_path: Path, quantkit: Command
) -> None:
    path, _ = auto_gptq(tiny_llama, tmp_path / "theirs")
    done = quantkit(*convert_to(path, "gguf:Q8_0"))
    assert "the source is quantized already (gptq)" in done.out


def test_settings_beside_plain_weights_are_of_no_account(copy: Path, quantkit: Command) -> None:
    (copy / "quantize_config.json").write_text(json.dumps(AUTO_GPTQ))
    assert quantkit("inspect", copy, "--json").json()["kind"] == "checkpoint"


# config.json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", r"config\.json: expected a JSON object, found list"),
        (b"null", r"config\.json: expected a JSON object, found NoneType"),
        (b"", r"config\.json: not JSON: Expecting value"),
        (b"hidden_size = 3", r"config\.json: not JSON"),
        (b"[" * 100_000, r"config\.json: not JSON"),
        ("{}".encode("utf-16"), r"config\.json: not UTF-8"),
        (b"\xef\xbb\xbf{}", r"config\.json: begins with a byte order mark"),
        (b"{}", r"names no architecture|Unrecognized model"),
    ],
)
def test_a_config_that_is_none(
    copy: Path, refused: Callable[..., str], content: bytes, message: str
) -> None:
    (copy / "config.json").write_bytes(content)
    for command in (convert_to(copy, "gguf:Q8_0"), recipe(copy)):
        assert re.search(message, refused(*command))
    if content != b"{}":
        assert re.search(message, refused("inspect", copy))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": "256"}, r"hidden_size.*expected int"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected a positive whole number"),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers is 1000000000, but there are weights for 20",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads|division|zero"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, expected"),
        ({"head_dim": 0}, "head_dim is 0, expected a positive whole number"),
        ({"head_dim": -64}, "head_dim is -64, expected"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000, expected"),
        (
            {"vocab_size": 10**9},
            r"\[1024, 256\].* config\.json (asks for|has the shape) \[1000000000, 256",
        ),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"layer_types": ["full_attention"] * 3}, "layer"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0, exp"),
        ({"rope_parameters": 10000}, "rope_parameters"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', expected a"),
        ({"architectures": [7]}, "architectures"),
        ({"quantization_config": "gptq"}, "quantization_config is 'gptq', expected an object"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, "quant_method is .'gptq'."),
        ({"hidden_act": 3}, "hidden_act"),
    ],
)
def test_values_that_make_no_sense_are_named(
    copy: Path, refused: Callable[..., str], settings: dict[str, Any], message: str
) -> None:
    edit(copy / "config.json", **settings)
    for entry in ("gguf:Q8_0", "gptq:w4g64"):
        found = refused(*recipe(copy, entry))
        assert re.search(message, found), found
        assert "config.json" in found or "quant" in message or "safetensors" in found


# The model card


@pytest.mark.parametrize(
    ("card", "note", "tags"),
    [
        (b"---\ntags: [a\n---\n", "cannot be read", None),
        (b"---\ntags:\n\t- a\n\tb\n---\n", "cannot be read", None),
        ("---\ntags: [größe]\n---\n".encode("latin-1"), "cannot be read", None),
        (b"---\n- a\n---\n", None, None),
        (b"---\ntags:\n---\n", None, None),
        (b"---\ntags: [null, a, 7]\n---\n", "tags is [None, 'a', 7], expected text", ["a"]),
        (b"---\ntags: 2024-01-01\nversion: 1.0\n---\n", "version is 1.0, expected text", None),
        (b"---\nlicense: {a: b}\nbase_model: [3]\n---\n", "license is {'a': 'b'}", None),
        (b"---\ntags: [a, b]\nwidget: [{text: x}]\n---\n", None, ["a", "b"]),
    ],
)
def test_a_model_card_keeps_nothing_from_being_converted(
    copy: Path, quantkit: Command, card: bytes, note: str | None, tags: list[str] | None
) -> None:
    (copy / "README.md").write_bytes(card)
    (made,) = quantkit(*convert_to(copy, "gguf:Q8_0"), "--json").json()
    notes = [n for n in made["notes"] if n.startswith("README.md")]
    assert bool(notes) == (note is not None)
    assert note is None or note in " ".join(notes)
    (file,) = Path(made["path"]).glob("*.gguf")
    field = gguf.GGUFReader(file).get_field("general.tags")
    assert (field.contents() if field else None) == tags


@pytest.mark.parametrize("value", ["x", [], {}, True])
def test_a_generation_config_that_holds_no_numbers(
    copy: Path, refused: Callable[..., str], value: Any
) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"temperature": value}))
    assert "generation_config.json: temperature is" in refused(*convert_to(copy, "gguf:Q8_0"))


# GGUF files


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf")
    return convert(Checkpoint.open(tiny_llama), Spec.parse("gguf:BF16"), None, out).weights


@pytest.mark.parametrize("name", ["sha256-0a1b2c", "model.GGUF", "weights.bin"])
def test_a_gguf_is_known_by_its_first_bytes(
    made: Path, tiny_llama: Path, tmp_path: Path, quantkit: Command, name: str
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    file = Path(shutil.copy(made, tmp_path / name))
    assert quantkit("inspect", file, "--json").json()["scheme"] == "BF16"
    (converted,) = quantkit(*convert_to(file, "gguf:Q8_0"), "--json").json()
    assert converted["spec"]["scheme"] == "Q8_0"
    planned = quantkit(*recipe(tmp_path / "model", {"path": str(file), "name": "blob"}), "--json")
    assert planned.json() == [{"id": "blob", "path": str(file)}]
    for tokenizer in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / tokenizer, tmp_path)
    found = quantkit("evaluate", file, *TEXT, "--json").json()
    (measured,) = found["models"].values()
    assert measured["texts"]["pydoc:evaluation"]["metrics"]["ppl"]["n"] == 31


def test_a_gguf_stands_in_no_checkpoints_place(made: Path, refused: Callable[..., str]) -> None:
    blob = made.parent.parent / "sha256-ff"
    shutil.copy(made, blob)
    reference = refused("evaluate", blob, "--reference", blob, *TEXT)
    assert "a GGUF is a source for `quantkit convert` only" in reference


def test_a_directory_of_gguf_files(
    made: Path, tmp_path: Path, quantkit: Command, refused: Callable[..., str]
) -> None:
    directory = tmp_path / "gguf"
    directory.mkdir()
    shutil.copy(made, directory / "model-BF16.gguf")
    (directory / "README.md").write_text("text")
    assert quantkit("inspect", directory, "--json").json()["scheme"] == "BF16"
    (converted,) = quantkit(*convert_to(directory, "gguf:Q8_0"), "--json").json()
    assert converted["source"]["id"] == "model-BF16"
    # What lies beside a model and is none does not count.
    writer = gguf.GGUFWriter(directory / "mmproj-F16.gguf", "clip")
    writer.add_type("mmproj")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert quantkit("inspect", directory, "--json").json()["scheme"] == "BF16"
    shutil.copy(made, directory / "other.GGUF")
    named = refused("inspect", directory)
    assert "holds 2 models; name one of model-BF16.gguf, other.GGUF" in named
    assert "holds 2 models" in refused(*convert_to(directory, "gguf:Q4_0"))
    assert "no tokenizer" in refused("evaluate", directory / "model-BF16.gguf", *TEXT)


# What others made, in a recipe


def test_plan_opens_what_others_made(
    tiny_llama: Path, copy: Path, tmp_path: Path, quantkit: Command
) -> None:
    theirs, _ = auto_gptq(tiny_llama, tmp_path / "theirs")
    good = {"path": str(theirs)}
    assert quantkit(*recipe(copy, good), "--json").json() == [{"id": "theirs", "path": str(theirs)}]

    broken = Path(shutil.copytree(theirs, tmp_path / "broken"))
    next(broken.glob("*.safetensors")).write_bytes(b"short")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"GGUF\3\0\0\0")
    plain = Path(shutil.copytree(tiny_llama, tmp_path / "plain"))
    entries = [good, *({"path": str(path)} for path in (broken, cut, plain))]
    ended = quantkit(*recipe(copy, *entries))
    assert ended.code == 1
    assert "theirs: measured as it is" in ended.out
    assert "broken" not in ended.out
    lines = ended.err.strip().splitlines()
    for line, name, what in zip(
        lines, ("broken", "cut", "plain"), ("damaged or trunc", "truncated", "not a variant"),
        strict=True,
    ):  # fmt: skip
        assert line.startswith(f"quantkit: {name}: "), line
        assert what in line
    listed = quantkit(*recipe(copy, *entries), "--json")
    assert [("error" in one) for one in json.loads(listed.out)] == [False, True, True, True]


def test_a_run_says_before_its_work_what_will_have_no_results(
    copy: Path, tmp_path: Path, quantkit: Command
) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    _, file = recipe(copy, "gguf:Q8_0", {"path": str(tmp_path / "cut.gguf")})
    ended = quantkit("run", file, "--out", tmp_path / "run")
    assert ended.code == 1
    said = ended.err.index("cut: will have no results: ")
    assert said < ended.err.index("gguf-Q8_0: convert")
    rows = {row.id: row for row in Ledger.read(tmp_path / "run" / "ledger.json").variants}
    assert rows["gguf-Q8_0"].texts["pydoc:evaluation"].metrics["ppl"].value > 0
    assert rows["cut"].failed is not None
    assert rows["cut"].failed.stage == "open"


# Adapters

GIVE_BASE = "give its base too: quantkit convert org/base"


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_says_what_it_is(
    copy: Path, refused: Callable[..., str], with_config: bool
) -> None:
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    if not with_config:
        (copy / "config.json").unlink()
    for command in (("inspect", copy), convert_to(copy, "gguf:Q8_0"), recipe(copy)):
        found = refused(*command)
        assert f"is a LoRA adapter of org/base, not a model; {GIVE_BASE} --adapter {copy}" in found


def test_an_adapter_in_a_recipe_says_what_it_is(
    copy: Path, tmp_path: Path, quantkit: Command
) -> None:
    adapter = Path(shutil.copytree(copy, tmp_path / "adapter"))
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    ended = quantkit(*recipe(copy, {"path": str(adapter)}))
    assert ended.code == 1
    assert "is a LoRA adapter of org/base, not a model; " + GIVE_BASE in ended.error


# Errors that nobody expected


def test_a_bug_is_one_line_and_names_debug(
    copy: Path, quantkit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: str) -> None:
        raise AssertionError("first\nsecond")

    monkeypatch.setattr("quantkit.api.inspect", broken)
    ended = quantkit("inspect", copy)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == (
        "quantkit: a bug in quantkit, not in what it was given: AssertionError: first; --debug "
        "shows where: please report it\n"
    )
    with pytest.raises(AssertionError):
        quantkit("inspect", copy, "--debug")


def test_a_file_that_may_not_be_read_is_one_line(
    copy: Path, quantkit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(_: str) -> None:
        raise PermissionError(13, "Permission denied", str(copy / "x"))

    monkeypatch.setattr("quantkit.api.inspect", denied)
    ended = quantkit("inspect", copy)
    assert (ended.code, ended.err) == (2, f"quantkit: {copy / 'x'}: Permission denied\n")
