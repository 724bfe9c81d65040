"""Groups of options that belong together on the command line; each reaches its verb as one dict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]


def calibration(command: Command) -> Command:
    """Which text the quantizers see, and where they run: the keys of a recipe's section."""
    return _grouped(
        "calibration",
        command,
        click.option(
            "--calibration",
            "text",
            default="wikitext-2:train",
            show_default=True,
            metavar="TEXT",
            help="Text for GPTQ, AWQ and importance matrices: a name or a file.",
        ),
        click.option(
            "--samples",
            type=click.IntRange(1),
            default=128,
            show_default=True,
            help="Calibration windows.",
        ),
        click.option(
            "--sequence-length",
            type=click.IntRange(8),
            default=512,
            show_default=True,
            help="Tokens a window.",
        ),
        click.option("--seed", default=0, show_default=True, help="Which windows."),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            help="Of the quantizers: cpu, cuda, cuda:N.",
        ),
    )


def producer(command: Command) -> Command:
    """Who makes the weights, and what it is told: ``producer`` and ``producer_args``."""
    return _grouped(
        "producer",
        command,
        click.option(
            "--producer",
            metavar="NAME",
            help="Of GPTQ and AWQ: native, or a package: auto-round, autoawq, auto-gptq.",
        ),
        click.option(
            "--producer-arg",
            "producer_args",
            multiple=True,
            metavar="NAME=VALUE",
            help="The package's own option, such as iters=50. May be repeated.",
        ),
    )


def verdicts(command: Command) -> Command:
    """When two models count as equivalent, and how many questions are asked to see it."""
    return _grouped(
        "verdicts",
        command,
        click.option(
            "--tolerance",
            type=click.FloatRange(0, 100, min_open=True, max_open=True),
            default=1.0,
            show_default=True,
            help="Points of accuracy, percent of perplexity, that count as no difference.",
        ),
        click.option(
            "--until",
            type=click.Choice(["decided"]),
            help="Ask in random order, and no more questions than a verdict needs.",
        ),
    )


def gguf(command: Command) -> Command:
    """What ``llama-quantize`` can be told, under its names; a dict of what was given."""
    return _grouped(
        "gguf",
        command,
        click.option(
            "--pure", is_flag=True, default=None, help="GGUF: one type, not a mix of types."
        ),
        click.option(
            "--output-type", metavar="TYPE", help="GGUF: of the output layer, such as Q8_0."
        ),
        click.option("--embedding-type", metavar="TYPE", help="GGUF: of the token embedding."),
        click.option(
            "--tensor-type",
            "tensor_types",
            multiple=True,
            metavar="PATTERN=TYPE",
            help="GGUF: of tensors by name, such as ffn_down=Q6_K. May be repeated.",
        ),
        click.option(
            "--imatrix",
            metavar="FILE",
            help="GGUF: importance matrix, or auto to compute one from the calibration text.",
        ),
        click.option(
            "--split-max-size", metavar="SIZE", help="GGUF: in parts of up to, such as 2G."
        ),
    )


def load(command: Command) -> Command:
    """What ``quantkit bench`` takes; each under its own name."""
    for option in reversed(
        (
            click.option(
                "--engine",
                "engines",
                multiple=True,
                help="llamacpp or vllm; by default the one that takes the format. May be repeated.",
            ),
            click.option(
                "--concurrency",
                default="1,4",
                show_default=True,
                help="Requests at a time; auto: 1, 2, 4 … until throughput stops growing.",
            ),
            click.option(
                "--rate", "rates", metavar="N,...", help="Requests a second, answered or not."
            ),
            click.option(
                "--arrivals",
                type=click.Choice(["poisson", "constant"]),
                help="How requests at a rate come. Default: poisson.",
            ),
            click.option(
                "--slo",
                metavar="ttft_ms=N,itl_ms=N",
                help="Search the highest rate at which 95 % of requests are as fast (share=0.95).",
            ),
            click.option(
                "--workload",
                type=click.Choice(["chat", "summarize", "long_output"]),
                help="512/128, 2048/128 or 128/512 tokens of prompt and output.",
            ),
            click.option("--prompt-tokens", type=int, help="Of each prompt. Default: 128."),
            click.option("--output-tokens", type=int, help="Of each answer. Default: 32."),
            click.option(
                "--prompts", metavar="FILE", help="Your own prompts, one JSON object a line."
            ),
            click.option(
                "--prefix-cache", is_flag=True, default=None, help="Let engines reuse what repeats."
            ),
            click.option("--seconds", type=float, help="Measured per repetition. Default: 15."),
            click.option("--repetitions", type=int, help="Of each load. Default: 3."),
            click.option(
                "--price-per-hour", type=float, help="Of this machine, for cost per token."
            ),
        )
    ):
        command = option(command)
    return command


def integers(command: Command) -> Command:
    """How the native GPTQ and AWQ round, and which linears; a dict of what was given."""
    return _grouped(
        "integers",
        command,
        click.option("--rounding", metavar="HOW", help="GPTQ, AWQ: closed-form, or learned."),
        click.option(
            "--iters", type=click.IntRange(1), help="GPTQ, AWQ: steps of learning a block."
        ),
        click.option(
            "--skip",
            multiple=True,
            metavar="PATTERN",
            help="GPTQ, AWQ: linears to leave as they are, such as down_proj. May be repeated.",
        ),
        click.option(
            "--override",
            "overrides",
            multiple=True,
            metavar="PATTERN=SCHEME",
            help="GPTQ: another scheme for some linears, such as down_proj=w8g64. May be repeated.",
        ),
    )


def serving(command: Command) -> Command:
    """What ``quantkit serve`` takes; each under its own name."""
    file = click.Path(path_type=Path)
    for option in reversed((
        click.option("--host", help="Default: 127.0.0.1."),
        click.option("--port", type=click.IntRange(1, 65535), help="Default: 8000."),
        click.option("--api-key", envvar="QUANTKIT_API_KEY", help="Demanded of clients."),
        click.option(
            "--engine", help="llamacpp or vllm; by default the one that takes the format."
        ),
        click.option("--context", type=click.IntRange(1), help="Tokens a request."),
        click.option(
            "--slots", type=click.IntRange(1), help="Requests at a time of an engine. Default: 4."
        ),
        click.option(
            "--engine-arg",
            "arguments",
            multiple=True,
            metavar="NAME[=VALUE]",
            help="Of the engine itself, such as tensor-parallel-size=2. May be repeated.",
        ),
        click.option(
            "--alias",
            "aliases",
            multiple=True,
            metavar="NAME=MODEL",
            help="Another name of a model. May be repeated.",
        ),
        click.option("--from-run", type=file, metavar="DIR", help="The variants of a run."),
        click.option("--config", type=file, metavar="FILE", help="All of it, as YAML."),
        click.option("--preload", is_flag=True, help="Start all engines at once, as one alone is."),
        click.option(
            "--idle-timeout", type=float, metavar="SECONDS", help="Unload unused engines."
        ),
        click.option("--memory-budget", metavar="SIZE", help="Of all engines, such as 8GiB."),
    )):  # fmt: skip
        command = option(command)
    return command


def wants(command: Command) -> Command:
    """What ``quantkit recommend`` is asked for; each under its own name."""
    for option in reversed((
        click.option(
            "--max-memory", metavar="SIZE", help="Peak of the server, measured, such as 6GiB."
        ),
        click.option(
            "--max-kld",
            type=click.FloatRange(0),
            help="Mean KL divergence, nats a token. Default: 0.05, unless --max-drop is given.",
        ),
        click.option(
            "--max-drop",
            type=click.FloatRange(0, 100),
            metavar="POINTS",
            help="Of accuracy, in each task.",
        ),
        click.option(
            "--min-goodput",
            type=click.FloatRange(0, min_open=True),
            metavar="RATE",
            help="Requests a second that meet --slo; by default the objective of the run.",
        ),
        click.option(
            "--slo",
            metavar="LIMITS",
            help="Such as ttft_ms=500,itl_ms=50: of 95 % of the requests, at --concurrency "
            "where no goodput is asked for.",
        ),
        click.option(
            "--concurrency",
            type=click.IntRange(1),
            help="Requests at a time at which throughput counts. Default: the most in the run.",
        ),
        click.option("--engine", metavar="NAME", help="Only what this engine served."),
    )):  # fmt: skip
        command = option(command)
    return command


def _grouped(name: str, command: Command, *options: Callable[[Command], Command]) -> Command:
    """``command`` with ``options``, whose values it gets as the dict ``name``."""

    @functools.wraps(command)
    def collecting(**given: Any) -> Any:
        return command(**{name: {key: given.pop(key) for key in keys}}, **given)

    before = list(getattr(command, "__click_params__", ()))
    wrapped: Command = collecting
    for option in reversed(options):
        wrapped = option(wrapped)
    added = [p for p in wrapped.__click_params__ if p not in before]  # type: ignore[attr-defined]
    keys = [str(parameter.name) for parameter in added]
    return wrapped
