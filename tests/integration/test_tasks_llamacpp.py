"""lm-eval's tasks on llama.cpp in process, beside transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.engines.llamacpp.scorer import LlamaScorer
from quantkit.errors import RecipeError
from quantkit.evaluation.tasks import run_task
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert


def test_questions_in_llama_cpp_are_answered_as_in_transformers(
    demo: Checkpoint, tmp_path: Path
) -> None:
    """In float32 on both sides: what is left is llama.cpp's 16-bit KV cache, which what else is in
    a batch moves as well."""
    from quantkit.engines.transformers import TransformersScorer

    variant = convert(demo, Spec("gguf", "F32"), None, tmp_path)
    common = (demo.tokenizer, 8192)
    plain = run_task("mmlu_dev", lambda n: TransformersScorer(demo, n), *common, limit=20)
    gguf = run_task("mmlu_dev", lambda n: LlamaScorer(variant, n), *common, limit=20)
    assert plain.protocol == gguf.protocol
    ours = torch.tensor([answer["loglikelihoods"] for answer in gguf.answers])
    theirs = torch.tensor([answer["loglikelihoods"] for answer in plain.answers])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_unknown_task_has_a_suggestion(demo: Checkpoint) -> None:
    """Here because lm-eval takes some 10 s to list its tasks."""

    def refuse(context: int) -> LlamaScorer:
        raise AssertionError("the model was loaded")

    with pytest.raises(RecipeError, match=r"unknown task 'mmlu_def'.*did you mean 'mmlu_dev'"):
        run_task("mmlu_def", refuse, demo.tokenizer, 2048)
