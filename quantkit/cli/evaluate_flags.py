"""Options of what is measured: ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
import cloup

from quantkit.cli.engine_flags import engine_options
from quantkit.cli.flags import Command, grouped, in_order
from quantkit.errors import RecipeError


def verdicts(command: Command) -> Command:
    """When two models count as equivalent, and how many questions are asked to see it."""
    return grouped(
        "verdicts",
        "Verdicts",
        command,
        click.option(
            "--tolerance",
            type=click.FloatRange(0, 100, min_open=True, max_open=True),
            default=1.0,
            metavar="N",
            help="Largest difference that counts as none: in points of accuracy, and"
            " in percent of perplexity.",
        ),
        click.option(
            "--until",
            type=click.Choice(["decided"]),
            help="Ask questions in random order, and stop when every verdict is decided.",
            show_default="ask all",
        ),
    )


def measuring(command: Command) -> Command:
    """What ``quantkit evaluate`` measures; each under its own name."""
    groups = (
        cloup.option_group(
            "What",
            click.option(
                "--reference",
                metavar="MODEL",
                help="Source to compare with, for drift: a directory, a hub id such as "
"org/name@revision, or demo:smollm2-135m.",
show_default="none, and no drift",
            ),
            click.option(
                "--engine",
                metavar="NAME",
                help="Engine that measures: transformers, llamacpp or vllm; with options, "
                "llamacpp:kv_cache=q8_0.",
show_default="the one that gives full logits for the format",
            ),
        ),
        engine_options,
        cloup.option_group(
            "Text",
            click.option(
                "--text",
                "texts",
                multiple=True,
                metavar="TEXT",
                help="Text for perplexity and KL divergence: a name such as "
"wikitext-2:test or stdlib:code, or a UTF-8 file. Each is measured separately. May be repeated.",
                show_default="none",
            ),
            click.option(
                "--context",
                type=click.IntRange(16),
                default=512,
                metavar="N",
                help="Length of each window of a text, in tokens.",
            ),
            click.option(
                "--windows",
                type=click.IntRange(1),
                metavar="N",
                help="Number of windows read from each text, starting at its beginning.",
show_default="all",
            ),
        ),
        cloup.option_group(
            "Tasks",
            click.option(
                "--eval",
                "tasks",
                multiple=True,
                metavar="NAME",
                help="An lm-eval task by its name, such as mmlu, or a YAML file of your "
"own. May be repeated.",
            ),
            click.option(
                "--eval-data",
                "data",
                multiple=True,
                metavar="TASK=PATH",
                help="Where a task finds its data on this machine, such as "
"mmlu_csv=./mmlu or wikitext_file=wiki.test.raw. May be repeated.",
            ),
            click.option(
                "--shots",
                type=click.IntRange(0),
                metavar="N",
                help="Number of solved examples before each question.",
show_default="the task's own",
            ),
            click.option(
                "--limit",
                type=click.IntRange(1),
                metavar="N",
                help="Number of questions in each task, and in each subject of a task "
"that has subjects.",
show_default="all",
            ),
            click.option(
                "--chat",
                is_flag=True,
                help="Ask each question as a user's message in the model's chat "
"template.",
            ),
        ),
        cloup.option_group(
            "Your own prompts",
            click.option(
                "--prompts",
                metavar="FILE",
                help="Prompts whose greedy answers are compared: one JSON object a line,"
' such as {"prompt": "The capital of France is"}.',
                show_default="none",
            ),
            click.option(
                "--max-answer-tokens",
                "answer_tokens",
                type=click.IntRange(1),
                default=128,
                metavar="N",
                help="Longest answer to a prompt, in tokens.",
            ),
        ),
    )  # fmt: skip
    return in_order(*groups, verdicts)(command)


def asked(*, verdicts: Mapping[str, Any], data: Sequence[str], **given: Any) -> dict[str, Any]:
    """What was typed, as the keys of a recipe's section."""
    return {
        **given,
        **verdicts,
        "data": _data(data),
    }


def _data(pairs: Sequence[str]) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in pairs)
    for task, path in found.items():
        if not task or not path:
            raise RecipeError(f"--eval-data {task or path}: expected TASK=PATH, as mmlu_csv=./mmlu")
    return found
