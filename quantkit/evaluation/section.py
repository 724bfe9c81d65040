"""The section of a recipe that says what is measured of every variant."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantkit.models.engine_config import EngineEntry
from quantkit.system.yaml_file import Section


class EvaluateSection(Section):
    """What is measured of every variant: texts, and lm-eval tasks by name or YAML file."""

    texts: list[str] = Field(default_factory=lambda: ["wikitext-2:test"])
    """Texts by name, such as ``pydoc:evaluation``, or UTF-8 files, each measured separately;
    ``[]``: none."""
    context: int = Field(512, ge=16)
    """Length of each window of a text, in tokens: llama.cpp's n_ctx."""
    windows: int | None = Field(None, ge=1)
    """Number of windows read from each text, starting at its beginning; null: all."""
    split_windows: int | None = Field(None, ge=2)
    """Number of windows of the first text over which each loss is split into conversion,
    quantization and engine; null: it is not split."""
    tasks: list[str] = Field(default_factory=list)
    """lm-eval tasks by name, such as ``mmlu``, or YAML files of your own."""
    shots: int | None = Field(None, ge=0)
    """Number of solved examples before each question; null: the task's own."""
    limit: int | None = Field(None, ge=1)
    """Number of questions in each task, and in each subject of a task that has subjects; null:
    all."""
    until: Literal["decided"] | None = None
    """``decided``: ask in random order, and stop when every verdict is decided."""
    prompts: str | None = None
    """File of prompts whose greedy answers are compared, one JSON object a line; or ``everyday``:
    the two dozen that come with quantkit."""
    answer_tokens: int = Field(128, ge=1)
    """Longest answer to a prompt, in tokens."""
    tolerance: float = Field(1.0, gt=0, lt=100)
    """Largest difference that counts as none: in points of accuracy, and in percent of
    perplexity."""
    chat: bool = False
    """Ask each question as a user's message in the model's chat template."""
    engine: EngineEntry | None = None
    """Engine that measures the formats that it takes, by a name or with options; for others the one
    that gives full logits. Null: the first of ``bench.engines`` that does, else the usual one."""
    data: dict[str, str] = Field(default_factory=dict)
    """Where tasks find their data on this machine, by the task's name: ``mmlu_csv`` and
    ``wikitext_file``."""
