"""Options of what is made: groups that belong together; each reaches its verb as one dict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click
import cloup

Command = Callable[..., Any]
Option = Callable[[Command], Command]


def calibration(command: Command) -> Command:
    """Which text the quantizers see, and where they run: the keys of a recipe's section."""
    return _grouped(
        "calibration",
        "Calibration",
        command,
        click.option(
            "--calibration",
            "text",
            default="mix",
            metavar="TEXT",
            help="Text that GPTQ, AWQ and importance matrices are fitted to: mix (of several "
            "kinds, offline), mix:hub, another name, or a UTF-8 file.",
        ),
        click.option(
            "--samples",
            type=click.IntRange(1),
            default=128,
            metavar="N",
            help="Number of windows that are taken from the calibration text.",
        ),
        click.option(
            "--sequence-length",
            type=click.IntRange(8),
            default=512,
            metavar="N",
            help="Length of each window, in tokens.",
        ),
        click.option(
            "--seed",
            type=int,
            default=0,
            metavar="N",
            help="Seed of the random choice of windows: the same seed takes the same windows.",
        ),
        click.option(
            "--device",
            default="auto",
            metavar="NAME",
            help="Where calibration, GPTQ and AWQ compute: cpu, cuda, or one GPU "
            "such as cuda:1; auto is a GPU where there is one.",
        ),
    )


def integers(command: Command) -> Command:
    """How the native GPTQ and AWQ round, and which linears; a dict of what was given."""
    return _grouped(
        "integers",
        "GPTQ and AWQ",
        command,
        click.option(
            "--rounding",
            metavar="HOW",
            help="How weights are rounded: closed-form, or learned by gradient steps.",
            show_default="closed-form",
        ),
        click.option(
            "--iters",
            type=click.IntRange(1),
            metavar="N",
            help="Gradient steps per decoder block of --rounding learned.",
            show_default="100",
        ),
        click.option(
            "--skip",
            multiple=True,
            metavar="PATTERN",
            help="Linear layers to leave unquantized: a regular expression, such as "
            r"down_proj or layers\.0\. May be repeated.",
        ),
        click.option(
            "--override",
            "overrides",
            multiple=True,
            metavar="PATTERN=SCHEME",
            help="Another scheme for some linear layers (GPTQ only), such as "
            "down_proj=w8g64. May be repeated.",
        ),
    )


def producer(command: Command) -> Command:
    """Who makes the weights, and what it is told: ``producer`` and ``producer_args``."""
    return _grouped(
        "producer",
        "GPTQ and AWQ by another package",
        command,
        click.option(
            "--producer",
            metavar="NAME",
            help="Package that makes the weights: auto-round, autoawq or auto-gptq, "
            "installed by `quantkit engines install`.",
            show_default="native, quantkit's own",
        ),
        click.option(
            "--producer-arg",
            "producer_args",
            multiple=True,
            metavar="NAME=VALUE",
            help="An option of that package, such as iters=50. May be repeated.",
        ),
    )


def gguf(command: Command) -> Command:
    """What ``llama-quantize`` can be told, under its names; a dict of what was given."""
    return _grouped(
        "gguf",
        "GGUF",
        command,
        click.option(
            "--pure",
            is_flag=True,
            default=None,
            help="Store all tensors in the one type, instead of the mix that the "
            "scheme stands for.",
        ),
        click.option(
            "--output-type",
            metavar="TYPE",
            help="Type of the output layer, such as Q8_0.",
            show_default="as the scheme says",
        ),
        click.option(
            "--embedding-type",
            metavar="TYPE",
            help="Type of the token embedding, such as Q6_K.",
            show_default="as the scheme says",
        ),
        click.option(
            "--tensor-type",
            "tensor_types",
            multiple=True,
            metavar="PATTERN=TYPE",
            help="Type of the tensors whose names match, such as ffn_down=Q6_K. May be repeated.",
        ),
        click.option(
            "--imatrix",
            metavar="FILE",
            help="Importance matrix: a file of llama-imatrix, or auto to compute one"
            " from the calibration text.",
            show_default="none",
        ),
        click.option(
            "--split-max-size",
            metavar="SIZE",
            help="Most bytes of tensors in one file, such as 2G or 500M; larger models are split.",
            show_default="one file",
        ),
    )


def verdicts(command: Command) -> Command:
    """When two models count as equivalent, and how many questions are asked to see it."""
    return _grouped(
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
                help="Engine that measures: transformers, llamacpp or vllm.",
show_default="the one that gives full logits for the format",
            ),
        ),
        cloup.option_group(
            "Text",
            click.option(
                "--text",
                metavar="TEXT",
                help="Text for perplexity and KL divergence: a name such as "
"wikitext-2:test, or a UTF-8 file.",
                show_default="none",
            ),
            click.option(
                "--context",
                type=click.IntRange(16),
                default=512,
                metavar="N",
                help="Length of each window of the text, in tokens.",
            ),
            click.option(
                "--windows",
                type=click.IntRange(1),
                metavar="N",
                help="Number of windows that are read, from the beginning.",
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


def in_order(*groups: Option) -> Option:
    """All of these, shown in this order."""
    return lambda command: functools.reduce(lambda done, add: add(done), reversed(groups), command)


def _grouped(name: str, title: str, command: Command, *options: Option) -> Command:
    """``command`` with ``options`` under ``title``, whose values it gets as the dict ``name``."""

    @functools.wraps(command)
    def collecting(**given: Any) -> Any:
        return command(**{name: {key: given.pop(key) for key in keys}}, **given)

    before = list(getattr(command, "__click_params__", ()))
    wrapped: Command = cloup.option_group(title, *options)(collecting)
    added = [p for p in wrapped.__click_params__ if p not in before]  # type: ignore[attr-defined]
    keys = [str(parameter.name) for parameter in added]
    return wrapped
