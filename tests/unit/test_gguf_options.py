"""Options of GGUF variants: what is refused, what they change, and how specs hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from quantkit.cli.main import cli
from quantkit.errors import ConversionError, RecipeError
from quantkit.formats.gguf import file_types, ggml
from quantkit.formats.gguf.imatrix import ImportanceMatrix, InputSquares
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import plan
from quantkit.producers.gguf.options import Options
from quantkit.producers.native_gguf import NativeGGUF
from quantkit.runs.recipe import load_recipe
from tests.models import make_checkpoint

Q4_K_M = Spec("gguf", "Q4_K_M")


def types_of(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def test_ggmls_types_are_those_of_the_gguf_package() -> None:
    ours = {kind.name: (kind.number, kind.block, kind.bytes) for kind in ggml.types().values()}
    theirs = {
        kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType
    }
    del ours["Q8_1"], theirs["Q8_1"]  # never stored; the package has the size of another age
    assert theirs.items() <= ours.items()
    assert ours["Q4_K"] == (12, 256, 144)
    assert set(file_types.TENSOR_TYPES) <= set(ours) | {"Q8_1"}
    assert ggml.numbered(12) == ggml.types()["Q4_K"]
    assert ggml.numbered(4) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"purr": True}, "unknown option 'purr'; gguf takes pure, .*did you mean 'pure'"),
        ({"pure": "yes"}, "pure is 'yes', expected true or false"),
        ({"output_type": "Q4_K_M"}, "output_type: 'Q4_K_M' is not a type of tensors; .*'Q4_K'"),
        ({"embedding_type": "w4"}, "embedding_type: 'w4' is not a type"),
        ({"tensor_types": {"ffn_down": "q7_k"}}, "tensor_types.ffn_down: 'q7_k' is not a type"),
        ({"tensor_types": "ffn_down=Q6_K"}, "expected patterns and types, .*not 'ffn_down=Q6_K'"),
        ({"tensor_types": {"": "Q6_K"}}, "expected patterns and types"),
        ({"imatrix": 3}, "imatrix is 3, expected true or a file's path"),
        ({"imatrix": "no/such.gguf"}, "imatrix no/such.gguf: no such file"),
        ({"split_max_size": "2 GB"}, "split_max_size is '2 GB', expected such as 2G"),
        ({"split_max_size": 0}, "split_max_size is 0"),
        ({"split_max_size": True}, "split_max_size is True"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Options.of(Q4_K_M.having(options))


@pytest.mark.parametrize("options", [{"pure": True}, {"tensor_types": {"a": "Q8_0"}}])
def test_what_has_no_effect_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(options))} has no effect on F16"):
        Options.of(Spec("gguf", "F16").having(options))


def test_other_formats_do_not_take_them(tiny_llama: Path) -> None:
    spec = Spec("gptq", "w4g64").having({"pure": True})
    with pytest.raises(RecipeError, match="unknown option 'pure'; gptq takes rounding, "):
        plan(Checkpoint.open(tiny_llama), spec)


def test_sizes_are_decimal_as_llama_cpps() -> None:
    for text, size in (("2G", 2_000_000_000), ("500M", 500_000_000), ("7K", 7000), (12, 12)):
        assert Options.of(Q4_K_M.having({"split_max_size": text})).split_max_size == size


def test_specs_with_options_are_keys() -> None:
    one = Q4_K_M.having({"tensor_types": {"a": "Q8_0", "b": "Q6_K"}, "pure": True})
    same = Q4_K_M.having({"pure": True, "tensor_types": {"a": "Q8_0", "b": "Q6_K"}})
    other = Q4_K_M.having({"pure": True, "tensor_types": {"b": "Q6_K", "a": "Q8_0"}})
    assert {one: 1}[same] == 1
    assert one != other  # the first pattern that matches decides
    assert Options.of(other).tensor_types == (("b", "Q6_K"), ("a", "Q8_0"))


def test_names_are_directories() -> None:
    entry = {"spec": "gguf:Q4_K_M", "name": "my-q4.1", "pure": True}
    assert Spec.of_entry(entry).directory == "my-q4.1"
    assert Spec.of_entry("gguf:Q4_K_M").directory == "gguf-Q4_K_M"
    for name in ("../x", "a/b", "", ".hidden", 3, "reference"):
        with pytest.raises(RecipeError, match="it becomes a directory"):
            Spec.of_entry({"spec": "gguf:Q4_K_M", "name": name})
    for wrong in (3, None, ["gguf:Q8_0"], {"name": "x"}, {"spec": 3}):
        with pytest.raises(RecipeError, match="expected format:scheme, or keys and values"):
            Spec.of_entry(wrong)


def test_recipes_take_entries_with_options(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: mine\nsource: ./model\nconvert:\n  - gguf:Q4_K_M\n"
        "  - spec: gguf:Q4_K_M\n    name: mine\n    tensor_types: {ffn_down: Q6_K}\n"
        "  - {spec: gguf:IQ2_M, imatrix: true}\n"
    )
    plain, mine, small = load_recipe(str(path)).specs
    assert (plain.options, plain.directory) == ((), "gguf-Q4_K_M")
    assert (mine.options, mine.directory) == ((("tensor_types", (("ffn_down", "Q6_K"),)),), "mine")
    assert small == Spec("gguf", "IQ2_M").having({"imatrix": True})
    path.write_text(path.read_text().replace("name: mine\n    ", ""))
    with pytest.raises(RecipeError, match="has gguf-Q4_K_M more than once; give each its own"):
        load_recipe(str(path))
    path.write_text(path.read_text().replace("gguf:IQ2_M", "ggfu:IQ2_M"))
    with pytest.raises(RecipeError, match=r"r\.yaml:7: convert\.2: .*did you mean 'gguf'"):
        load_recipe(str(path))


def test_options_choose_types(tiny_llama: Path, tmp_path: Path) -> None:
    options = {
        "pure": True,
        "embedding_type": "q5_1",
        "tensor_types": {r"BLK\.0.*ffn_(up|gate)": "Q8_0", "ffn": "iq4_nl"},
    }
    NativeGGUF().convert(Checkpoint.open(tiny_llama), Q4_K_M.having(options), None, tmp_path)
    (file,) = tmp_path.iterdir()
    types = types_of(file)
    assert types.pop("token_embd.weight") == "Q5_1"
    matrices = {name: kind for name, kind in types.items() if kind != "F32"}
    assert matrices.pop("blk.0.ffn_up.weight") == matrices.pop("blk.0.ffn_gate.weight") == "Q8_0"
    assert {kind for name, kind in matrices.items() if "ffn" in name} == {"IQ4_NL"}
    assert {kind for name, kind in matrices.items() if "ffn" not in name} == {"Q4_K"}


def test_a_named_type_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    narrow = make_checkpoint(tmp_path / "narrow", hidden_size=96, intermediate_size=160)
    with pytest.raises(RecipeError, match=r"token_embd.weight cannot be of Q6_K: its 96 columns"):
        NativeGGUF().plan(Checkpoint.open(narrow), Q4_K_M.having({"embedding_type": "Q6_K"}))


def test_a_bad_pattern_is_refused_in_llama_cpps_words(tiny_llama: Path) -> None:
    with pytest.raises(ConversionError, match=r"cannot quantize this to Q4_K_M: Mismatched '\('"):
        NativeGGUF().plan(
            Checkpoint.open(tiny_llama), Q4_K_M.having({"tensor_types": {"a(": "Q8_0"}})
        )


def matrix(checkpoint: Checkpoint, *without: str) -> ImportanceMatrix:
    """All channels of all matrices of the blocks alike."""
    hidden, inner = checkpoint.config["hidden_size"], checkpoint.config["intermediate_size"]
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down")
    entries = {
        f"blk.{block}.{kind}.weight": InputSquares(
            np.ones((1, inner if kind == "ffn_down" else hidden), np.float32),
            np.ones(1, np.float32),
        )
        for block in range(checkpoint.config["num_hidden_layers"])
        for kind in kinds
        if kind not in without
    }
    return ImportanceMatrix(entries, ("text",), 1, 128)


def test_a_matrix_must_cover_what_needs_one(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    path = tmp_path / "imatrix.gguf"
    spec = Spec("gguf", "IQ3_XXS").having({"imatrix": str(path)})
    matrix(checkpoint).write(path)
    planned = NativeGGUF().plan(checkpoint, spec)
    assert not planned.needs_calibration
    assert planned.options["imatrix"]["file"] == str(path)
    matrix(checkpoint, "attn_output").write(path)  # IQ3_S, which needs none
    assert NativeGGUF().plan(checkpoint, spec).options["imatrix"] != planned.options["imatrix"]
    matrix(checkpoint, "attn_q").write(path)
    better = spec.having({"imatrix": str(path), "tensor_types": {"attn_q": "Q4_K"}})
    NativeGGUF().plan(checkpoint, better)
    with pytest.raises(
        ConversionError, match=r"blk.0.attn_q.weight IQ2_S, and the .* not cover it"
    ):
        NativeGGUF().plan(checkpoint, spec)


def test_a_matrix_to_be_computed_asks_for_calibration(tiny_llama: Path, tmp_path: Path) -> None:
    spec = Spec("gguf", "IQ2_XXS").having({"imatrix": True})
    assert NativeGGUF().plan(Checkpoint.open(tiny_llama), spec).needs_calibration
    with pytest.raises(RecipeError, match="imatrix: true needs calibration text"):
        NativeGGUF().convert(Checkpoint.open(tiny_llama), spec, None, tmp_path)


def test_options_on_the_command_line(tiny_llama: Path, tmp_path: Path) -> None:
    def run(*words: Any) -> Result:
        command = ["convert", tiny_llama, "--out", tmp_path / "out", *words]
        return CliRunner().invoke(cli, list(map(str, command)))

    wanted = ["--to", "gguf:Q4_0", "--to", "gguf:Q8_0", "--pure", "--output-type", "q6_k"]
    ended = run(*wanted, "--tensor-type", "ffn_down=F16", "--tensor-type", "ffn=q5_0", "--json")
    assert ended.exit_code == 0, ended.output
    for variant in json.loads(ended.stdout):
        given = {key: variant["spec"][key] for key in ("pure", "output_type", "tensor_types")}
        pairs = [["ffn_down", "F16"], ["ffn", "Q5_0"]]
        assert given == {"pure": True, "output_type": "Q6_K", "tensor_types": pairs}
        (file,) = Path(variant["path"]).glob("*.gguf")
        assert types_of(file)["blk.1.ffn_down.weight"] == "F16"
    ended = run("--to", "gptq:w4g64", "--split-max-size", "2G")
    assert "--split-max-size: only gguf takes it" in str(ended.exception)
