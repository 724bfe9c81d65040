"""Tasks on the command line: choices and written answers, and what is refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit.cli.main import cli
from quantkit.engines.transformers import Transformers
from quantkit.engines.vllm import VLLM
from quantkit.errors import QuantkitError
from quantkit.runs import pipeline
from quantkit.runs.recipe import load_recipe


def _evaluate(model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quantkit", "evaluate", str(model), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )


def test_choices_and_written_answers_in_one_table(tiny_llama: Path) -> None:
    ended = _evaluate(
        tiny_llama, "--eval", "template", "--eval", "template_answers", "--chat", "--json"
    )
    assert ended.returncode == 0, ended.stderr
    (found,) = json.loads(ended.stdout)["models"].values()
    measured = found["metrics"]
    assert measured.keys() == {
        "template_acc", "template_acc_norm", "template_answers_exact_match_stripped",
    }  # fmt: skip
    for metric in measured.values():
        assert metric["n"] == 4
        assert metric["engine"]["name"] == "transformers"
        assert "transformers" not in json.dumps(metric["protocol"])
        assert len(metric["protocol"]["chat_template_sha256"]) == 64


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("expected TASK=PATH", ("--eval", "template", "--eval-data", "mmlu")),
        ("llamacpp does not load safetensors", ("--eval", "template", "--engine", "llamacpp")),
        ("did you mean 'vllm'?", ("--eval", "template", "--engine", "vlm")),
        ("--eval-data mmlu_csv=PATH", ("--eval", "mmlu_csv")),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    tiny_llama: Path, said: str, arguments: tuple[str, ...]
) -> None:
    ended = CliRunner().invoke(cli, ["evaluate", str(tiny_llama), *arguments])
    assert isinstance(ended.exception, QuantkitError)
    assert said in str(ended.exception)
    assert "\n" not in str(ended.exception)


def test_a_recipe_names_the_engine_for_what_it_takes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transformers in vLLM's place; a GGUF, which it does not take, stays in llama.cpp."""
    monkeypatch.setattr(VLLM, "version", lambda _: "0.0.0")
    monkeypatch.setattr(VLLM, "check", lambda *_: None)
    monkeypatch.setattr(VLLM, "language_model", lambda _, *given: Transformers().scorer(*given))
    settings = (
        f"source={tiny_llama}", "bench=null", "evaluate.texts=[]", "evaluate.engine=vllm",
        "evaluate.prompts=null", "evaluate.tasks=[template]", "convert=[gguf:Q8_0]",
    )  # fmt: skip
    ledger = pipeline.run(load_recipe("quickstart", settings), tmp_path / "run")
    assert not ledger.failed
    engines = [row.metrics["template_acc"].engine.name for row in ledger.variants]
    assert engines == ["vllm", "llamacpp"]
    # Another engine is another result.
    again = pipeline.run(
        load_recipe("quickstart", [*settings, "evaluate.engine=null"]), tmp_path / "run"
    )
    assert again.reference.metrics["template_acc"].engine.name == "transformers"
