"""LoRA adapters merged into their base: the oracle is PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit import api
from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats.detect import open_model, open_source
from quantkit.formats.merged import open_merged
from quantkit.ledger import Ledger
from quantkit.models.checkpoint import Checkpoint
from quantkit.producers import merge
from quantkit.runs import pipeline
from quantkit.runs.recipe import load_recipe
from tests.adapters import make_adapter, merged_by_peft
from tests.command_line import Command, of_fixtures
from tests.models import make_checkpoint

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "every linear, bf16": {"target_modules": ALL, "dtype": torch.bfloat16},
    "rslora": {"use_rslora": True},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "v_proj": 32},
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "embedding, bf16": {"target_modules": ["embed_tokens"], "dtype": torch.bfloat16},
    "whole modules": {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    "dora": {"target_modules": [*ALL, "embed_tokens"], "use_dora": True},
    "some layers": {"layers_to_transform": [1], "target_modules": ALL},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's blocks, not tied."""
    path = tmp_path_factory.mktemp("base") / "Tiny-Llama"
    return make_checkpoint(path, tie_word_embeddings=False)


def _compare(base: Path, adapter: Path, tmp_path: Path) -> set[str]:
    """Every tensor with PEFT's; the names of those that are not the base's."""
    theirs = Checkpoint.open(merged_by_peft(base, adapter, tmp_path / "theirs"))
    ours = open_merged(base, adapter)
    assert ours.tensors.keys() == theirs.tensors.keys()
    changed = set()
    for name, info in ours.tensors.items():
        merged = ours.read(name)
        assert (merged.shape, merged.dtype) == (info.shape, info.torch_dtype)
        expected = theirs.read(name)
        assert merged.dtype == expected.dtype
        assert torch.equal(merged, expected), name
        if not torch.equal(merged, Checkpoint.open(base).read(name)):
            changed.add(name)
    return changed


@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_that_of_peft(case: str, base: Path, tmp_path: Path) -> None:
    settings = CASES[case]
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    changed = _compare(base, adapter, tmp_path)
    targets = settings.get("target_modules", ["q_proj", "down_proj"])
    named = [*targets, *settings.get("modules_to_save", [])]
    layers = settings.get("layers_to_transform", [0, 1])
    assert changed == {
        name
        for name in Checkpoint.open(base).tensors
        if name.split(".")[-2] in named
        and (".layers." not in name or int(name.split(".")[2]) in layers)
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("use_dora", [False, True])
def test_other_dtypes_of_the_base(dtype: torch.dtype, use_dora: bool, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype=dtype, tie_word_embeddings=False)
    targets = ["q_proj", "embed_tokens"]
    adapter = make_adapter(base, tmp_path / "a", use_dora=use_dora, target_modules=targets)
    assert _compare(base, adapter, tmp_path)


def test_matrices_that_are_stored_turned(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", family="gpt2", n_embd=64, n_head=4, n_layer=2)
    for number, targets in enumerate((["c_attn", "c_proj"], ["c_fc", "c_proj"])):
        for use_dora in (False, True):
            place = tmp_path / f"{number}{use_dora}"
            adapter = make_adapter(base, place / "a", target_modules=targets, use_dora=use_dora)
            assert len(_compare(base, adapter, place)) == 6


def test_names_that_transformers_gives_otherwise(tmp_path: Path) -> None:
    """OpenAI's GPT-2 was stored without the prefix of its decoder."""
    base = make_checkpoint(tmp_path / "base", family="gpt2", n_embd=64, n_head=4, n_layer=2)
    adapter = make_adapter(base, tmp_path / "a", target_modules=["c_attn"])
    named = open_merged(base, adapter)
    file = base / "model.safetensors"
    stored = load_file(file)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(bare, file, {"format": "pt"})
    found = open_merged(base, adapter)
    assert set(found.changes) == {f"h.{layer}.attn.c_attn.weight" for layer in (0, 1)}
    for name in found.changes:
        expected = stored[f"transformer.{name}"]
        assert not torch.equal(found.read(name), expected)
        assert found.read(name).shape == named.tensors[f"transformer.{name}"].shape


# What is made of it


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "my-lora", target_modules=ALL)


@pytest.fixture(scope="module")
def theirs(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT makes of both, under the name that quantkit gives it."""
    return merged_by_peft(base, adapter, tmp_path_factory.mktemp("peft") / "Tiny-Llama-my-lora")


@pytest.fixture
def quantkit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return of_fixtures(monkeypatch, capfd)


def test_variants_are_those_of_the_checkpoint_that_peft_saves(
    base: Path, adapter: Path, theirs: Path, tmp_path: Path
) -> None:
    specs = ["gguf:F32", "gguf:Q4_K_M", "gptq:w4g64", "awq:w4g64"]
    few = {"text": "pydoc:calibration", "samples": 4, "sequence_length": 64}
    out, expected = tmp_path / "ours", tmp_path / "theirs"
    made = api.convert({"base": base, "adapter": adapter}, specs, out, calibration=few)
    api.convert(theirs, specs, expected, calibration=few)
    for variant in made:
        files = [*variant.path.glob("*.gguf"), *variant.path.glob("*.safetensors")]
        assert files
        for file in files:
            assert file.read_bytes() == (expected / variant.id / file.name).read_bytes(), file
    assert sorted(path.name for path in out.iterdir()) == sorted(one.id for one in made)


def test_the_manifest_names_base_and_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    given = {"base": str(base), "adapter": str(adapter)}
    (made,) = api.convert(given, ["gguf:Q8_0"], tmp_path / "out")
    assert made.manifest is not None
    source = made.manifest.source
    assert source.id == "Tiny-Llama-my-lora"
    assert source.merged is not None
    assert source.merged.base.id == "Tiny-Llama"
    assert source.merged.base.sha256 == Checkpoint.open(base).sha256
    assert source.merged.adapter.id == "my-lora"
    assert source.merged.adapter.sha256.keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    weights = Checkpoint.open(base).sha256["model.safetensors"]
    assert source.sha256["model.safetensors"] not in (weights, None)
    told = "Tiny-Llama with the LoRA adapter my-lora merged into it"
    assert told in made.manifest.notes
    assert api.inspect(made.path)["manifest"]["source"]["merged"]["base"]["id"] == "Tiny-Llama"


def test_what_engines_load_is_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Of a plan nothing can be loaded; what is written are files of its own."""
    planned = open_merged(base, adapter)
    with pytest.raises(CheckpointError, match="not written yet, so no engine can load it"):
        _ = planned.weights
    source = merge.kept(planned, tmp_path, force=False)
    assert source.weights == source.path == tmp_path / "Tiny-Llama-my-lora"
    assert source.merged == planned.record
    assert source.origin == planned.origin
    stored = load_file(source.weights / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(stored[name], planned.read(name))
    assert not torch.equal(stored[name], Checkpoint.open(base).read(name))
    again = open_model(source.path)
    assert isinstance(again, Checkpoint)
    assert again.merged == planned.record
    assert not list(source.path.glob("adapter*"))
    for file in base.glob("tokenizer*"):
        assert (source.path / file.name).read_bytes() == file.read_bytes()


RECIPE = """\
name: r
source: {{base: {base}, adapter: {adapter}}}
convert: [gguf:Q8_0, gptq:w4g64]
calibration: {{text: "pydoc:calibration", samples: 4, sequence_length: 64}}
evaluate: {{texts: ["pydoc:evaluation"], windows: 2, context: 64}}
bench: null
"""


def test_a_run_measures_the_merged_model(
    base: Path, adapter: Path, theirs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.format(base=base, adapter=adapter))
    recipe = load_recipe(str(file))
    found = pipeline.run(recipe, tmp_path / "run")
    expected = pipeline.run(load_recipe(str(file), [f"source={theirs}"]), tmp_path / "theirs")
    plain = pipeline.run(
        load_recipe(str(file), [f"source={base}", "convert=[]"]), tmp_path / "plain"
    )

    def metrics(ledger: Ledger) -> list[dict[str, float]]:
        texts = [row.texts["pydoc:evaluation"].metrics for row in ledger.variants]
        return [{name: one.value for name, one in text.items()} for text in texts]

    assert not found.failed
    assert metrics(found) == metrics(expected)
    assert metrics(found)[0]["ppl"] != metrics(plain)[0]["ppl"]
    assert found.source.sha256["model.safetensors"] == expected.source.sha256["model.safetensors"]
    assert found.source.merged is not None
    assert found.source.origin == "Tiny-Llama with the LoRA adapter my-lora merged into it"
    report = (tmp_path / "run" / "report.md").read_text()
    assert found.source.merged.adapter.sha256["adapter_model.safetensors"] in report
    capfd.readouterr()
    pipeline.run(recipe, tmp_path / "run")
    said = capfd.readouterr().err
    assert "Tiny-Llama-my-lora: merged already" in said
    assert "gguf-Q8_0: made already" in said


def test_another_adapter_in_the_same_run_needs_force(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = make_adapter(base, tmp_path / "my-lora", lora_alpha=1)
    place = tmp_path / "source"
    first = merge.kept(open_merged(base, adapter), place, force=False)
    digests = first.sha256
    with pytest.raises(RecipeError, match=r"was merged from another base or adapter; .*--force"):
        merge.kept(open_merged(base, other), place, force=False)
    assert Checkpoint.open(first.path).sha256 == digests
    second = merge.kept(open_merged(base, other), place, force=True)
    assert second.path == first.path
    assert second.sha256 != digests


def test_a_quantized_base_is_decoded_first(base: Path, adapter: Path, tmp_path: Path) -> None:
    (quantized,) = api.convert(
        base,
        ["gptq:w4g64"],
        tmp_path / "q",
        calibration={"text": "pydoc:calibration", "samples": 2, "sequence_length": 64},
    )
    decoded = open_source(quantized.path)
    found = open_merged(quantized.path, adapter)
    name = "model.layers.1.mlp.down_proj.weight"
    update = open_merged(base, adapter).adapter.updates[name.removesuffix(".weight")]
    down, up = (found.adapter.read(one) for one in (update.down, update.up))
    expected = (decoded.read(name).float() + up @ down * (12 / 4)).to(decoded.read(name).dtype)
    assert torch.equal(found.read(name), expected)
    written = merge.kept(found, tmp_path / "source", force=False)
    assert "quantization_config" not in json.loads((written.path / "config.json").read_text())
    assert not (written.path / "quantize_config.json").exists()
    assert isinstance(open_model(written.path), Checkpoint)
    assert "the base is quantized (gptq): it was decoded to" in " ".join(written.notes)


def test_commands(base: Path, adapter: Path, tmp_path: Path, quantkit: Command) -> None:
    out = tmp_path / "out"
    command = ("--adapter", adapter, "--to", "gguf:Q8_0", "--out", out, "--json")
    (made,) = quantkit("convert", base, *command).json()
    assert made["source"]["merged"]["adapter"]["id"] == "my-lora"
    named = [f"--set=source.base={base}", f"--set=source.adapter={adapter}"]
    ended = quantkit("plan", "quickstart", "--set", "bench=null", *named)
    assert ended.code == 0, ended.err
    assert "with the LoRA adapter my-lora merged into it" in ended.out
    assert "MB more for the merged source, which is kept" in ended.out


# What is refused


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{base: ./b}", "adapter: Field required"),
        ("{base: ./b, adaptor: ./a}", r"adaptor: Extra.*did you mean 'adapter'\?"),
        ("7", "is 7, expected a model, or `base` and `adapter`"),
        ("[./a]", "expected a model, or `base` and `adapter`"),
    ],
)
def test_a_source_of_a_recipe_that_is_none(value: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"name: r\nsource: {value}\nconvert: [gguf:Q8_0]\n")
    with pytest.raises(RecipeError, match=rf"r\.yaml:2: source: .*{message}") as caught:
        load_recipe(str(file))
    assert "\n" not in str(caught.value)


def _set(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def _rename(adapter: Path, old: str, new: str) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def _pickle(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def _half(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, file, {"format": "pt"})


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another kind": (lambda a: _set(a, peft_type="LOHA"), "peft_type is LOHA; quantkit merges LOR"),
    "biases": (lambda a: _set(a, bias="all"), "bias is 'all', which quantkit does not merge"),
    "a changed base": (lambda a: _set(a, init_lora_weights="pissa"), "init_lora_weights is 'pissa"),
    "more layers": (
        lambda a: _set(a, layer_replication=[[0, 2]]),
        r"layer_replication is \[\[0, 2",
    ),
    "an unreadable rank": (
        lambda a: _set(a, r="many"),
        r"adapter_config\.json: r: Input should be",
    ),
    "another rank": (lambda a: _set(a, r=8), "do not fit rank 8 of adapter_config"),
    "no settings": (
        lambda a: (a / "adapter_config.json").unlink(),
        "no adapter_config.json; a LoRA",
    ),
    "pickle": (_pickle, r"only adapter_model\.bin, which is pickle and never loaded; save it with"),
    "half": (_half, "has .*lora_A.weight only"),
    "no magnitude": (lambda a: _set(a, use_dora=True), "lora_magnitude_vector: get the adapter"),
    "no such module": (
        lambda a: _rename(a, "o_proj", "other_proj"),
        r"changes model.layers.\d.self_attn.other_proj.weight, which Tiny-Llama has not: it is",
    ),
    "one layer more": (
        lambda a: _rename(a, "layers.1", "layers.2"),
        r"changes model.layers.2\..*, which Tiny-Llama has not",
    ),
    "another part": (
        lambda a: _rename(a, "lora_A.weight", "lora_C.weight"),
        "nothing that quantki",
    ),
    "others' names": (lambda a: _rename(a, "base_model.model.", ""), "PEFT's names begin with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(
    case: str, base: Path, adapter: Path, tmp_path: Path, quantkit: Command
) -> None:
    change, message = REFUSED[case]
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_merged(base, copy)
    command = ("--adapter", copy, "--to", "gguf:Q8_0", "--out", tmp_path / "out")
    ended = quantkit("convert", base, *command)
    assert (ended.code, ended.err) == (2, f"quantkit: {caught.value}\n")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base(adapter: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", hidden_size=128)
    expected = r"its model.* is \[.*\], that of other is \[.*\]: it is an adapter of another model"
    with pytest.raises(CheckpointError, match=expected):
        open_merged(other, adapter)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_tied_is_not_changed(
    name: str, whole: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    asked = {"modules_to_save": [name]} if whole else {"target_modules": [name]}
    adapter = make_adapter(tiny_llama, tmp_path / "a", **asked)
    with pytest.raises(CheckpointError, match=rf"changes .*{name}.weight, which in .* is tied"):
        open_merged(tiny_llama, adapter)


def test_a_merge_beyond_float16_leaves_nothing(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype=torch.float16, tie_word_embeddings=False)
    adapter = make_adapter(base, tmp_path / "a", lora_alpha=10_000_000)
    with pytest.raises(CheckpointError, match=r"gives NaN or values beyond torch\.float16"):
        api.convert({"base": base, "adapter": adapter}, ["gguf:Q8_0"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        merge.kept(open_merged(base, adapter), tmp_path / "source", force=False)
    assert not list((tmp_path / "source").iterdir())


def test_what_a_reader_should_know(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    tensors = load_file(copy / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    save_file(kept, copy / "adapter_model.safetensors", {"format": "pt"})
    _set(copy, base_model_name_or_path="org/Another-Llama")
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    shutil.copyfile(base / "tokenizer.json", copy / "tokenizer.json")
    _, *notes = open_merged(base, copy).notes
    assert notes == [
        "the adapter has nothing for 3 of the modules that it names as its targets, "
        "model.layers.1.mlp.gate_proj for one: is it one of this base?",
        "the adapter says that its base is org/Another-Llama",
        "the base's files are taken, not the adapter's own chat_template.jinja",
    ]
