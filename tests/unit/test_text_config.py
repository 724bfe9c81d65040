"""Models that see, whose language model transformers cannot build by itself, are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForImageTextToText

from quantkit.cli.main import cli
from quantkit.engines.transformers import Transformers, TransformersScorer
from quantkit.errors import ConversionError, IncompatibleVariant
from quantkit.evaluation.tokenizer_match import require_same_tokens
from quantkit.formats.detect import open_variant
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.runs import pipeline
from quantkit.runs.recipe import Recipe
from tests.integration.gguf_oracle import convert
from tests.models import VOCABULARY, make_checkpoint, write_tokenizer

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 96,
    "deepstack_visual_indexes": [],
}
MESSAGE = "has a language model in text_config that transformers cannot build by itself"


@pytest.fixture(scope="module", params=["qwen3_vl"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / request.param
    config = AutoConfig.for_model(
        request.param,
        text_config=TEXT,
        vision_config=VISION,
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def test_evaluation_is_refused_before_any_work(path: Path) -> None:
    source = Checkpoint.open(path)
    with pytest.raises(IncompatibleVariant, match=MESSAGE) as caught:
        Transformers().check(source)
    assert "\n" not in str(caught.value)
    with pytest.raises(IncompatibleVariant, match=MESSAGE):
        TransformersScorer(source, 16).__enter__()
    options = ["--text", "pydoc:evaluation", "--windows", "2"]
    done = CliRunner().invoke(cli, ["evaluate", str(path), *options])
    assert isinstance(done.exception, IncompatibleVariant)


def test_a_run_that_measures_is_refused_by_its_plan(path: Path) -> None:
    recipe = {"name": "sees", "source": str(path), "convert": ["gguf:Q8_0"]}
    with pytest.raises(IncompatibleVariant, match=MESSAGE):
        pipeline.plan(Recipe.model_validate(recipe | {"evaluate": {"texts": ["pydoc:evaluation"]}}))


def test_blocks_are_refused_by_the_plan(path: Path) -> None:
    with pytest.raises(ConversionError, match="has no causal language model"):
        pipeline.plan_variant(Checkpoint.open(path), Spec.parse("gptq:w4g64"))


def test_its_vocabulary_is_compared_with_that_of_a_gguf(path: Path, tmp_path: Path) -> None:
    """Where config.json has no ``vocab_size`` of its own."""
    file = convert(Checkpoint.open(make_checkpoint(tmp_path / "text")), "F32", tmp_path / "out")
    require_same_tokens(Checkpoint.open(path), open_variant(file))
