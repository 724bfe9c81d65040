"""How long a run's steps usually take, roughly, before any of them was done.

On two ordinary cores, for a recipe and a source of any size: what grows with the model and the
tokens is counted, the rest is a constant. ``quantkit.runs.course`` corrects it as steps are done.
"""

from __future__ import annotations

from quantkit.benchmark.section import BenchSection
from quantkit.evaluation.section import EvaluateSection
from quantkit.models.checkpoint import Checkpoint
from quantkit.runs.recipe import Recipe

_FLOPS = 2e11
"""A second, of a forward pass."""
_WRITTEN = 4
"""Tokens that are read in the time it takes to write one."""
_PROMPTS, _QUESTIONS = (24, 40), (300, 100)
"""Prompts and questions, and tokens of each, assumed until they are counted."""
_QUANTIZING = 4
"""Forward passes over the calibration text that GPTQ and AWQ take in all."""
_BYTES_WRITTEN = 1e8
"""A second, of a GGUF and its proof."""
_START = {"llamacpp": 3.0, "vllm": 30.0}
_BESIDES = 3.0
"""Seconds that the load generator takes for itself at each load."""


def usual_seconds(
    recipe: Recipe,
    source: Checkpoint,
    stage: str,
    *,
    made: bool = False,
    by_blocks: bool = False,
    engine: str = "vllm",
) -> float:
    """Of one stage of one row. ``made``: whether it is a variant that is made here; ``by_blocks``:
    one that is quantized block after block; ``engine``: what serves it."""
    each = 2 * source.parameters / _FLOPS
    evaluate, bench = recipe.evaluate, recipe.bench
    if stage == "convert":
        calibration = recipe.calibration
        tokens = calibration.samples * calibration.sequence_length
        return 1 + (_QUANTIZING * tokens * each if by_blocks else source.bytes / _BYTES_WRITTEN)
    if stage == "bench" and bench:
        return _START.get(engine, max(_START.values())) + _loads(bench)
    if evaluate is None:
        return 1.0
    if stage in ("split", "noise floor"):
        return 3 + 2 * (evaluate.split_windows or 0) * evaluate.context * each
    if not made and stage == "evaluate":  # the source's own logits are known already
        return 3 + _asked(evaluate) * each
    return 3 + (_text(evaluate) + _prompts(evaluate) + _asked(evaluate)) * each


def _loads(bench: BenchSection) -> float:
    if bench.budget_seconds:
        return bench.budget_seconds
    levels = 6 if bench.concurrency == "auto" else len(bench.concurrency)
    return (levels + len(bench.rates)) * bench.repetitions * (1.5 * bench.seconds + _BESIDES)


def _text(evaluate: EvaluateSection) -> float:
    """Tokens; of a text that is read whole as many as WikiText-2 has."""
    return (evaluate.windows or 600) * evaluate.context * len(evaluate.texts)


def _prompts(evaluate: EvaluateSection) -> float:
    """Tokens that are read for the prompts, and for what is written."""
    count, length = _PROMPTS
    answer = (1 + _WRITTEN) * evaluate.answer_tokens
    return count * (length + answer) if evaluate.prompts else 0


def _asked(evaluate: EvaluateSection) -> float:
    count, length = _QUESTIONS
    return len(evaluate.tasks) * (evaluate.limit or count) * length * (1 + (evaluate.shots or 0))
