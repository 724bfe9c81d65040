"""Recipes: shipped ones load, wrong ones say where."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from quantkit.data.mix import MIXES
from quantkit.data.standard_library import stdlib_modules
from quantkit.data.text import Text
from quantkit.data.texts import NAMED, check_disjoint, load_text, load_texts
from quantkit.errors import RecipeError
from quantkit.runs import pipeline
from quantkit.runs.recipe import load_recipe
from quantkit.system.packaged import packaged_files

GOOD = """\
name: mine
source: ./model
convert:
  - gguf:Q4_K_M
  - gptq:w4g64
evaluate:
  windows: 8
"""


@pytest.mark.parametrize("path", packaged_files("recipes"), ids=lambda path: path.stem)
def test_shipped_recipes_load_by_name(path: Path) -> None:
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert recipe.calibration.text in MIXES
    assert recipe.evaluate is not None
    assert len(recipe.evaluate.texts) > 1  # of different kinds
    assert set(recipe.evaluate.texts) <= set(NAMED)


def test_the_quickstart_is_what_the_demo_promises() -> None:
    recipe = load_recipe("quickstart")
    assert recipe.convert == ["gguf:Q8_0", "gguf:Q4_K_M", "gguf:Q4_0", "gptq:w4g64", "awq:w4g64"]
    assert recipe.bench is not None
    assert recipe.bench.concurrency == [1, 4]
    assert recipe.bench.budget_seconds is not None
    assert recipe.evaluate is not None
    assert (recipe.evaluate.tasks, recipe.evaluate.prompts) == ([], "everyday")


def test_overrides_reach_sections_and_are_yaml() -> None:
    recipe = load_recipe(
        "quickstart",
        ["source=./x", "evaluate.tasks=[mmlu, arc_easy]", "bench=null", "evaluate.windows=3"],
    )
    assert recipe.source == "./x"
    assert recipe.bench is None
    assert recipe.evaluate is not None
    assert recipe.evaluate.tasks == ["mmlu", "arc_easy"]
    assert recipe.evaluate.windows == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("windows: 8", "window: 8"),
            r"r\.yaml:7: unknown key 'evaluate\.window'; .*did you mean 'windows'\?",
        ),
        (
            ("windows: 8", "windows: many"),
            r"r\.yaml:7: evaluate\.windows: .*valid integer.*\"many\"",
        ),
        (
            ("windows: 8", "windows: 0"),
            r"r\.yaml:7: evaluate\.windows: .*greater than or equal to 1",
        ),
        (("source: ./model\n", ""), r"r\.yaml: 'source' is missing"),
        (
            ("gptq:w4g64", "gtpq:w4g64"),
            r"r\.yaml:5: convert\.1: .*unknown format 'gtpq'.*did you mean 'gptq'\?",
        ),
        (("gptq:w4g64", "gptq"), r"r\.yaml:5: convert\.1: .*expected format:scheme"),
        (("gptq:w4g64", "gguf:Q4_K_M"), r"has gguf-Q4_K_M more than once; give each its own"),
        (("name: mine", "name: a/b"), r"r\.yaml:1: name: "),
        (("convert:\n", "convert: [\n"), r"r\.yaml: not YAML"),
        (
            ("evaluate:\n  windows: 8", "extra: 1"),
            r"r\.yaml:6: unknown key 'extra'; keys here are name",
        ),
    ],
)
def test_what_is_wrong_is_said_with_line_and_key(
    change: tuple[str, str], message: str, tmp_path: Path
) -> None:
    assert change[0] in GOOD
    path = tmp_path / "r.yaml"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_recipes_and_overrides() -> None:
    with pytest.raises(RecipeError, match=r"not a shipped recipe .*did you mean 'quickstart'\?"):
        load_recipe("quickstrat")
    with pytest.raises(RecipeError, match=r"absent\.yaml: no such file"):
        load_recipe("absent.yaml")
    with pytest.raises(RecipeError, match="expected key=value"):
        load_recipe("quickstart", ["bench"])


def test_demo_texts_share_no_paragraph() -> None:
    calibration, evaluation = load_text("pydoc:calibration"), load_text("pydoc:evaluation")
    check_disjoint(calibration, evaluation)
    assert len(calibration.text) > 80_000
    assert len(evaluation.text) > 150_000


def test_code_is_split_by_module() -> None:
    calibration, evaluation = load_text("stdlib:calibration"), load_text("stdlib:code")
    check_disjoint(calibration, evaluation)
    for text, least in ((calibration, 900_000), (evaluation, 150_000)):
        assert len(text.text) > least
        assert "\n    return " in text.text
    both = [stdlib_modules(calibration=part) for part in (True, False)]
    assert not both[0].keys() & both[1].keys()
    for modules, remainders in zip(both, ({0}, {1, 2, 3}), strict=True):
        digests = [hashlib.sha256(name.encode()).digest() for name in modules]
        assert digests == sorted(digests)
        assert {digest[0] % 4 for digest in digests} == remainders
    names = both[0].keys() | both[1].keys()
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not [name for name in names if "test" in name.split("/") or "topics" in name]


def test_code_to_evaluate_on_takes_its_modules_in_turns() -> None:
    lines = load_text("stdlib:code").text.splitlines()
    defined = [line for line in lines if line.startswith("def ")]
    firsts = []
    for path in stdlib_modules(calibration=False).values():
        own = [line for line in path.read_text().splitlines() if line.startswith("def ")]
        firsts += own[:1]
    assert firsts[:14] == defined[:14]


def test_several_texts_have_a_name_each(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("x")
    assert list(load_texts(["pydoc:evaluation", str(path)])) == ["pydoc:evaluation", "mine.txt"]
    assert load_texts([]) == {}
    with pytest.raises(RecipeError, match=r"mine\.txt is there twice"):
        load_texts([str(path), str(path)])


def test_a_shared_paragraph_is_refused() -> None:
    paragraph = "The one sentence that stands in both of these texts, long enough to be noticed."
    one, two = Text("one", None, f"a\n{paragraph}\nb"), Text("two", None, f"c\n  {paragraph}\n")
    with pytest.raises(RecipeError, match="'one' holds 1 paragraphs of the evaluation text 'two'"):
        check_disjoint(one, two)


def test_texts_from_files(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("grün\n")
    assert load_text(str(path)).text == "grün\n"
    path.write_bytes(b"ok \xff")
    with pytest.raises(RecipeError, match=r"not UTF-8 \(byte 3\)"):
        load_text(str(path))
    with pytest.raises(RecipeError, match=r"did you mean 'wikitext-2:test'\?"):
        load_text("wikitext-2:tset")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.engine=vlm"], r"unknown engine 'vlm'.*did you mean 'vllm'\?"),
        (["evaluate.engine=vllm"], "evaluate.engine: vllm gives no logits of the whole vocabulary"),
        (
            ["evaluate.engine=llamacpp", "convert=[gptq:w4g64]"],
            "llamacpp takes gguf, and there is only gptq, safetensors",
        ),
    ],
)
def test_an_engine_that_cannot_measure_is_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    settings = [f"source={tiny_llama}", "bench=null", *overrides]
    with pytest.raises(RecipeError, match=message):
        pipeline.run(load_recipe("quickstart", settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
