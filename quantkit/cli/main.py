"""The command line: parse, call, print. No logic of its own; heavy imports wait for their verb."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click
import cloup

from quantkit import api
from quantkit.cli import engine_flags, evaluate_flags, flags, load_flags
from quantkit.cli.doctor import doctor
from quantkit.cli.engines import engines
from quantkit.errors import QuantkitError, first_line
from quantkit.system import extras
from quantkit.system.progress import to_terminal
from quantkit.system.threads import spin_briefly
from quantkit.version import __version__

_BEGIN = """\
quantkit: from a transformers checkpoint to the quantized variant to ship, with proof.

Four commands to begin with, for a model in ./my-model:

  quantkit plan quickstart --set source=./my-model   names and sizes; makes nothing
  quantkit run quickstart --set source=./my-model    make, measure and compare variants
  quantkit recommend runs/quickstart                 which one to ship, and why
  quantkit serve --from-run runs/quickstart          serve them behind an OpenAI API

All commands: quantkit --help. The options of one: quantkit run --help."""

_RECIPE = cloup.argument(
    "recipe", help="A shipped recipe, quickstart or wikitext-mmlu, or a YAML file of your own."
)
_SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Another value for a key of the recipe, such as source=./my-model "
    "or evaluate.windows=8. May be repeated.",
)
_PATHS = cloup.argument(
    "paths", nargs=-1, required=True, metavar="PATH...", help="Variants, checkpoints or GGUF files."
)
_RUN = cloup.argument(
    "directory",
    type=click.Path(path_type=Path),
    metavar="RUN_DIR",
    help="The directory of a run, such as runs/quickstart.",
)


@cloup.group(
    invoke_without_command=True,
    context_settings=cloup.Context.settings(
        help_option_names=["-h", "--help"],
        show_default=True,
        formatter_settings=cloup.HelpFormatter.settings(max_width=100, theme=cloup.HelpTheme()),
    ),
)
@click.version_option(__version__, prog_name="quantkit")
@click.option(
    "--debug", is_flag=True, help="Print details of the work, and the traceback of an error."
)
@cloup.pass_context
def cli(context: cloup.Context, debug: bool) -> None:
    """From a transformers checkpoint to the quantized variant to ship, with proof.

    Begin with:  quantkit run quickstart
    """
    if debug:
        logging.basicConfig(stream=sys.stderr)
    to_terminal(debug=debug)
    if context.invoked_subcommand is None:
        click.echo(_BEGIN)


@cloup.command()
@_RECIPE
@cloup.option_group("What", _SET)
@cloup.option_group(
    "Output",
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Directory of the run: variants, results, report.html.",
        show_default="runs/ and the recipe's name",
    ),
    flags.FORCE,
    flags.JSON,
)
def run(
    recipe: str, out: Path | None, overrides: tuple[str, ...], force: bool, as_json: bool
) -> None:
    """Make, measure and compare variants, as a recipe says.

    An interrupted run continues where it stopped when the same command is given again.

    Example:  quantkit run quickstart --set source=./my-model --out runs/mine
    """
    from quantkit.cli import show

    loaded = api.recipe(recipe, *overrides)
    directory = api.directory_of(loaded, out)
    ledger = api.run(loaded, out=directory, force=force)
    show.ledger(ledger, directory, as_json)
    if ledger.failed:
        sys.exit(1)


@cloup.command()
@_RECIPE
@cloup.option_group("What", _SET)
@flags.OUTPUT
def plan(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what a run would make: names, sizes, fallbacks.

    Makes nothing. Variants that somebody else made are opened; the exit code is 1 if one of
    them cannot be measured.

    Example:  quantkit plan quickstart --set source=./my-model
    """
    from quantkit.cli import show

    planned = api.plan(recipe, *overrides)
    show.plan(planned, as_json)
    for name, problem in planned.unusable.items():
        click.echo(f"quantkit: {name}: {problem}", err=True)
    if planned.unusable:
        sys.exit(1)


@cloup.command()
@cloup.argument(
    "model",
    help="A directory, a hub id such as org/name@revision, demo:smollm2-135m, or an unquantized "
    "GGUF file, from which other GGUF files can be made.",
)
@flags.making
@flags.calibration
@flags.gguf
@flags.integers
@flags.compressed
@flags.producer
def convert(
    model: str,
    adapter: str | None,
    specs: tuple[str, ...],
    out: Path,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make variants of a model: GGUF, GPTQ, AWQ, compressed-tensors.

    Options of a format apply to every --to of that format.

    Example:  quantkit convert ./my-model --to gguf:Q4_K_M --to awq:w4g128 --out variants
    """
    from quantkit.cli import show
    from quantkit.cli.spec_arguments import specs_of

    given = {name: options.pop(name) for name in ("gguf", "integers", "compressed", "producer")}
    source = {"base": model, "adapter": adapter} if adapter else model
    made = api.convert(source, specs_of(specs, **given), out, force=force, **options)
    show.variants(made, as_json)


@cloup.command()
@_PATHS
@evaluate_flags.measuring
@flags.OUTPUT
def evaluate(paths: tuple[str, ...], reference: str | None, as_json: bool, **options: Any) -> None:
    """Measure quality: perplexity, KL divergence, tasks.

    All models read the same tokens and answer the same questions.

    Example:  quantkit evaluate variants/* --reference ./my-model --eval mmlu --text wikitext-2:test

    Example:  quantkit evaluate variants/* --reference ./my-model --text mine.txt --text stdlib:code
    """
    from quantkit.cli import show
    from quantkit.cli.evaluate_flags import asked

    own = engine_flags.asked(**options.pop("engine_options"))
    found = api.evaluate(paths, reference, **asked(**options), engine_options=own)
    show.evaluated(found, as_json)


@cloup.command()
@_PATHS
@load_flags.load
@flags.OUTPUT
def bench(paths: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Measure speed under load, on the real engine.

    Example:  quantkit bench variants/* --concurrency auto --workload chat

    Example:  quantkit bench variants/gguf-Q4_K_M --slo ttft_ms=500,itl_ms=50
    """
    from quantkit.cli import show_load
    from quantkit.cli.load_section import section

    own = engine_flags.asked(**options.pop("engine_options"))
    results = api.bench(paths, section(**options), engine_options=own)
    show_load.results(results, as_json)
    if any(result.error for result in results.values()):
        sys.exit(1)


@cloup.command()
@_RUN
@load_flags.wants
@flags.OUTPUT
def recommend(directory: Path, as_json: bool, **options: Any) -> None:
    """Say which variant of a run to ship, and why.

    Considers every quantized variant on every engine that served it. Among those that meet all
    limits beyond the noise, the first criterion of --for decides; where the data cannot tell them
    apart by it, the next one does. The reference is recommended only if no quantized variant meets
    the limits. The answer also says what the runner-up would cost, which limit binds, and what the
    data cannot decide. The exit code is 1 if nothing meets the limits.

    Example:  quantkit recommend runs/mine --for laptop --max-memory 6GiB
    """
    from quantkit.cli import show_recommendation
    from quantkit.ledger import Ledger

    ledger, wants = Ledger.of_run(directory), load_flags.wants_of(**options)
    found = api.recommend(ledger, wants)
    show_recommendation.recommendation(ledger, found, api.profiles(ledger, wants), as_json)
    if found.pick is None:
        sys.exit(1)


@cloup.command()
@cloup.argument("paths", nargs=-1, metavar="[PATH]...", help="Variants, checkpoints or GGUF files.")
@load_flags.serving
def serve(paths: tuple[str, ...], **options: Any) -> None:
    """Serve variants behind an OpenAI-compatible API.

    One endpoint for all, until Ctrl-C. A single PATH is loaded at the start; with several, each
    engine starts on its first request.

    Example:  quantkit serve variants/gguf-Q4_K_M variants/awq-w4g128 --alias fast=gguf-Q4_K_M
    """
    own = engine_flags.asked(**options.pop("engine_options"))
    sys.exit(api.serve(paths, **options, engine_options=own))


@cloup.command()
@_RUN
def report(directory: Path) -> None:
    """Write a run's report again from its ledger.

    Writes report.html and report.md from ledger.json, and prints where.

    Example:  quantkit report runs/quickstart
    """
    click.echo(api.report(directory))


@cloup.command()
@cloup.argument("path", help="A checkpoint, a variant or a GGUF file; a hub id, too.")
@cloup.option_group(
    "Output",
    click.option(
        "--all",
        "everything",
        is_flag=True,
        help="Print hashes, long lists and long texts too, in full.",
    ),
    flags.JSON,
)
def inspect(path: str, everything: bool, as_json: bool) -> None:
    """Show what a model is: sizes, schemes, origin, oddities.

    Example:  quantkit inspect model-Q4_K_M.gguf
    """
    from quantkit.cli import show_facts

    show_facts.facts(api.inspect(path), as_json=as_json, everything=everything)


@cloup.command()
@cloup.argument("path", type=click.Path(path_type=Path), help="A variant's directory.")
@flags.OUTPUT
def verify(path: Path, as_json: bool) -> None:
    """Check a variant's files against its manifest.

    The exit code is 1 if a file is missing, changed or not in the manifest.

    Example:  quantkit verify variants/gguf-Q4_K_M
    """
    from quantkit.cli import show

    problems = api.verify(path)
    show.problems(path, problems, as_json)
    if problems:
        sys.exit(1)


cli.section("To begin with", plan, run, recommend, serve)
cli.section("One step of a run", convert, evaluate, bench, report)
cli.section("What is there", inspect, verify, engines, doctor)


def main() -> None:
    """Entry point: one line for any error, a traceback with --debug."""
    rest = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = ["--debug"] if len(rest) < len(sys.argv) - 1 else []  # wherever it was written
    spin_briefly()
    try:
        cli(debug + rest, standalone_mode=False)
    except click.exceptions.Abort:
        _interrupted()
    except KeyboardInterrupt:
        _interrupted()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        code, line = _explained(error)
        click.echo(f"quantkit: {line}", err=True)
        sys.exit(code)


def _explained(error: Exception) -> tuple[int, str]:
    """Exit code and message for what ended the command."""
    if isinstance(error, QuantkitError):
        return error.exit_code, str(error)
    if isinstance(error, ModuleNotFoundError) and (line := extras.explained(error)):
        return 2, line
    if isinstance(error, OSError) and error.filename is not None:  # the disk, permissions
        return 2, f"{error.filename}: {error.strerror}"
    return 1, (
        f"a bug in quantkit, not in what it was given: {type(error).__name__}: "
        f"{first_line(error)}; --debug shows where: please report it"
    )


def _interrupted() -> None:
    click.echo("quantkit: interrupted; run the same command again to continue", err=True)
    sys.exit(130)
