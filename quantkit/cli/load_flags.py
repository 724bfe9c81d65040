"""Options of what is run: ``bench``, ``serve`` and ``recommend``; each under its own name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from quantkit.cli.engine_flags import engine_options
from quantkit.cli.flags import Command, in_order
from quantkit.errors import RecipeError

if TYPE_CHECKING:
    from quantkit.recommendation import Wants

_FILE = click.Path(path_type=Path)


def load(command: Command) -> Command:
    """What ``quantkit bench`` takes."""
    return in_order(
        cloup.option_group(
            "What",
            click.option(
                "--engine",
                "engines",
                multiple=True,
                metavar="NAME",
                help="Engine that serves: llamacpp or vllm; with options, "
                "llamacpp:kv_cache=q8_0. May be repeated.",
                show_default="the one that takes the format",
            ),
            click.option(
                "--prefix-cache",
                is_flag=True,
                default=None,
                help="Let engines reuse the prefixes that prompts have in common.",
                show_default="every prompt is new to them",
            ),
        ),
        engine_options,
        cloup.option_group(
            "Load",
            click.option(
                "--concurrency",
                default="1,4",
                metavar="N,...",
                help="Requests at the same time, such as 1,4,16; auto tries 1, 2, 4 … "
                "until throughput stops growing.",
            ),
            click.option(
                "--rate",
                "rates",
                metavar="N,...",
                help="Requests per second, sent whether or not earlier ones are "
                "answered, such as 0.5,2.",
                show_default="none",
            ),
            click.option(
                "--arrivals",
                type=click.Choice(["poisson", "constant"]),
                help="How the requests of --rate and --slo arrive: at random times, or evenly.",
                show_default="poisson",
            ),
            click.option(
                "--slo",
                metavar="LIMITS",
                help="Objective in milliseconds, such as ttft_ms=500,itl_ms=50: search for "
                "the goodput, the highest rate at which 95 % of the requests meet "
                "it (share=0.99: 99 %).",
                show_default="none",
            ),
            click.option(
                "--seconds",
                type=float,
                metavar="N",
                help="Length of each repetition, in seconds, after its warm-up.",
                show_default="15",
            ),
            click.option(
                "--repetitions",
                type=int,
                metavar="N",
                help="How often each load is repeated; results are medians.",
                show_default="3",
            ),
            click.option(
                "--budget-seconds",
                type=click.FloatRange(0, min_open=True),
                metavar="N",
                help="Time for all loads of one variant on one engine, in seconds: windows "
                "and repetitions are cut to fit, and the result says so.",
                show_default="no limit",
            ),
        ),
        cloup.option_group(
            "Requests",
            click.option(
                "--workload",
                type=click.Choice(["chat", "summarize", "long_output"]),
                help="Lengths of prompt and answer by name, in tokens: 512 and 128, 2048"
                " and 128, 128 and 512.",
                show_default="none: --prompt-tokens and --output-tokens",
            ),
            click.option(
                "--prompt-tokens",
                type=int,
                metavar="N",
                help="Length of each prompt, in tokens.",
                show_default="128",
            ),
            click.option(
                "--output-tokens",
                type=int,
                metavar="N",
                help="Length of each answer, in tokens.",
                show_default="32",
            ),
            click.option(
                "--prompts",
                metavar="FILE",
                help='Your own prompts: one JSON object a line, such as {"prompt": "Once upon"}.',
                show_default="synthetic ones",
            ),
        ),
        cloup.option_group(
            "Cost",
            click.option(
                "--price-per-hour",
                type=float,
                metavar="N",
                help="Price of this machine per hour, in your currency, such as 2.5: "
                "gives the cost per million tokens.",
                show_default="none",
            ),
        ),
    )(command)


def serving(command: Command) -> Command:
    """What ``quantkit serve`` takes."""
    return in_order(
        cloup.option_group(
            "What",
            click.option(
                "--from-run",
                type=_FILE,
                metavar="DIR",
                help="Serve all variants of a run, such as runs/quickstart.",
                show_default="none",
            ),
            click.option(
                "--alias",
                "aliases",
                multiple=True,
                metavar="NAME=MODEL",
                help="Another name for a model, such as fast=gguf-Q4_0. May be repeated.",
            ),
            click.option(
                "--config",
                type=_FILE,
                metavar="FILE",
                help="YAML file that says all of this and more: docs/serving.md.",
                show_default="none",
            ),
        ),
        cloup.option_group(
            "Address",
            click.option(
                "--host",
                metavar="ADDRESS",
                help="Address to listen on; 0.0.0.0 is all networks.",
                show_default="127.0.0.1",
            ),
            click.option(
                "--port",
                type=click.IntRange(1, 65535),
                metavar="N",
                help="Port to listen on.",
                show_default="8000",
            ),
            click.option(
                "--api-key",
                envvar="QUANTKIT_API_KEY",
                show_envvar=True,
                metavar="KEY",
                help="Key that clients must send.",
                show_default="no key",
            ),
        ),
        cloup.option_group(
            "Engines",
            click.option(
                "--engine",
                metavar="NAME",
                help="Engine that serves: llamacpp or vllm; with options, llamacpp:kv_cache=q8_0.",
                show_default="the one that takes the format",
            ),
            click.option(
                "--context",
                type=click.IntRange(1),
                metavar="N",
                help="Most tokens of a request and its answer together.",
                show_default="the model's own limit",
            ),
            click.option(
                "--slots",
                type=click.IntRange(1),
                metavar="N",
                help="Number of requests that one engine computes at the same time.",
                show_default="4",
            ),
        ),
        engine_options,
        cloup.option_group(
            "Several models",
            click.option(
                "--preload",
                is_flag=True,
                help="Start all engines now, instead of each on its first request.",
            ),
            click.option(
                "--idle-timeout",
                type=float,
                metavar="SECONDS",
                help="Stop an engine that has not been used for this long.",
                show_default="never",
            ),
            click.option(
                "--memory-budget",
                metavar="SIZE",
                help="Most memory of all engines together, such as 8GiB; the least recently "
                "used is stopped to make room.",
                show_default="no limit",
            ),
        ),
    )(command)


def wants(command: Command) -> Command:
    """What ``quantkit recommend`` is asked for."""
    return in_order(
        cloup.option_group(
            "For whom",
            click.option(
                "--for",
                "profile",
                type=click.Choice(["laptop", "server", "quality"]),
                help="What comes first: little memory (laptop), goodput or throughput under load "
                "(server), or little drift (quality).",
                show_default="laptop; server if it was measured on a GPU",
            ),
        ),
        cloup.option_group(
            "Limits",
            click.option(
                "--max-memory",
                metavar="SIZE",
                help="Most memory that the server may take at its peak, as measured, such as 6GiB.",
                show_default="no limit",
            ),
            click.option(
                "--max-kld",
                type=click.FloatRange(0),
                metavar="NATS",
                help="Largest mean KL divergence, in nats per token.",
                show_default="10 (laptop), 5 (server) or 1 (quality) times the run's tolerance "
                "in perplexity, as KL divergence; none with --max-drop",
            ),
            click.option(
                "--drift",
                type=click.Choice(["worst", "mean"]),
                default="worst",
                help="What counts if several texts were measured: each variant's worst text, "
                "or the mean of all.",
            ),
            click.option(
                "--max-drop",
                type=click.FloatRange(0, 100),
                metavar="POINTS",
                help="Most accuracy that any task may lose, in points.",
                show_default="no limit",
            ),
            click.option(
                "--min-goodput",
                type=click.FloatRange(0, min_open=True),
                metavar="RATE",
                help="Lowest goodput, in requests per second that meet --slo.",
                show_default="no limit",
            ),
            click.option(
                "--slo",
                metavar="LIMITS",
                help="Objective in milliseconds, such as ttft_ms=500,itl_ms=50, that 95 "
                "% of the requests must meet.",
                show_default="the one that the run benched",
            ),
        ),
        cloup.option_group(
            "What",
            click.option(
                "--concurrency",
                type=click.IntRange(1),
                metavar="N",
                help="Number of requests at the same time for which throughputs are compared.",
                show_default="the most in the run; the fewest for a laptop",
            ),
            click.option(
                "--engine",
                metavar="NAME",
                help="Consider only this engine: llamacpp or vllm; with options, "
                "llamacpp:kv_cache=q8_0.",
                show_default="all",
            ),
        ),
    )(command)


def wants_of(*, max_memory: str | None, slo: str | None, **given: Any) -> Wants:
    """What was typed; raise RecipeError for what makes no sense."""
    from quantkit.ledger.load import Slo
    from quantkit.recommendation import Wants
    from quantkit.system.sizes import parse_size

    try:
        memory = None if max_memory is None else parse_size(max_memory)
    except ValueError as error:
        raise RecipeError(f"--max-memory: {error}") from error
    return Wants(max_memory=memory, slo=None if slo is None else Slo.parse(slo), **given)
