"""Options in groups, and those of what is made: some reach their verb as one dict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import cloup

Command = Callable[..., Any]
Option = Callable[[Command], Command]

JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
FORCE = click.option("--force", is_flag=True, help="Replace what is there already.")
OUTPUT = cloup.option_group("Output", JSON)


def in_order(*groups: Option) -> Option:
    """All of these, shown in this order."""
    return lambda command: functools.reduce(lambda done, add: add(done), reversed(groups), command)


def grouped(name: str, title: str, command: Command, *options: Option) -> Command:
    """``command`` with ``options`` under ``title``, whose values it gets as the dict ``name``."""

    @functools.wraps(command)
    def collecting(**given: Any) -> Any:
        return command(**{name: {key: given.pop(key) for key in keys}}, **given)

    before = list(getattr(command, "__click_params__", ()))
    wrapped: Command = cloup.option_group(title, *options)(collecting)
    added = [p for p in wrapped.__click_params__ if p not in before]  # type: ignore[attr-defined]
    keys = [str(parameter.name) for parameter in added]
    return wrapped


def making(command: Command) -> Command:
    """What ``quantkit convert`` makes, and where; each under its own name."""
    return in_order(
        cloup.option_group(
            "What",
            click.option(
                "--to",
                "specs",
                multiple=True,
                required=True,
                metavar="SPEC",
                help="Format and scheme of a variant, such as gguf:Q4_K_M, gptq:w4g128 "
                "or awq:w4g64. May be repeated.",
            ),
            click.option(
                "--adapter",
                metavar="ADAPTER",
                help="LoRA adapter that is merged into MODEL first: a directory or a hub id.",
                show_default="none",
            ),
            click.option(
                "--allow-requantize",
                is_flag=True,
                help="Accept a MODEL that is a quantized GGUF; what it lost stays lost.",
            ),
            click.option(
                "--allow-tokenizer-differences",
                is_flag=True,
                help="Accept GGUF files with which llama.cpp splits some texts into "
                "other tokens than MODEL's tokenizer.",
            ),
        ),
        cloup.option_group(
            "Output",
            click.option(
                "--out",
                type=click.Path(path_type=Path),
                required=True,
                metavar="DIR",
                help="Directory that gets one directory for each variant, such as variants.",
            ),
            FORCE,
            JSON,
        ),
    )(command)


def calibration(command: Command) -> Command:
    """Which text the quantizers see, and where they run: the keys of a recipe's section."""
    return grouped(
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
            help="Number of windows taken from the calibration text.",
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
            "such as cuda:1; auto is a GPU if there is one.",
        ),
    )


def compressed(command: Command) -> Command:
    """What the schemes of compressed-tensors leave open; a dict of what was given."""
    return grouped(
        "compressed",
        "compressed-tensors",
        command,
        click.option(
            "--algorithm",
            type=click.Choice(("gptq", "awq", "rtn", "best-scale")),
            help="What decides on the weights: gptq, awq (W4A16_ASYM) or rtn, round to nearest; of "
            "floats best-scale or rtn.",
            show_default="gptq; of floats best-scale, of MXFP4 rtn",
        ),
        click.option(
            "--smoothing/--no-smoothing",
            default=None,
            help="Whether outliers of activations are moved into the weights first, of W8A8.",
            show_default="of W8A8 by gptq: yes",
        ),
        click.option(
            "--group-size",
            type=int,
            metavar="N",
            help="Input channels that share a scale, of W4A16, W4A16_ASYM and W8A16: 32, 64, 128, "
            "or -1 for all.",
            show_default="128",
        ),
    )


def integers(command: Command) -> Command:
    """How the native quantizers round, and which linears; a dict of what was given."""
    return grouped(
        "integers",
        "GPTQ, AWQ and compressed-tensors",
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
            help="Another scheme for some linear layers (GPTQ, compressed-tensors), such as "
            "down_proj=w8g64 or down_proj=W8A16. May be repeated.",
        ),
    )


def producer(command: Command) -> Command:
    """What makes the weights, and its options: ``producer`` and ``producer_args``."""
    return grouped(
        "producer",
        "GPTQ, AWQ and compressed-tensors by another package",
        command,
        click.option(
            "--producer",
            metavar="NAME",
            help="Package that makes the weights: auto-round, autoawq, auto-gptq or "
            "llm-compressor, installed by `quantkit engines install`.",
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
    return grouped(
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
