"""The command line: parse, call, print. No logic of its own; heavy imports wait for their verb."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from quantkit import __version__
from quantkit.cli import flags
from quantkit.cli.engines import engines
from quantkit.errors import QuantkitError, first_line
from quantkit.threads import spin_briefly

_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_FORCE = click.option("--force", is_flag=True, help="Replace what exists.")
_SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, such as evaluate.windows=8. May be repeated.",
)
_PATHS = click.argument("paths", nargs=-1, required=True, metavar="PATH...")


class _Verbs(click.Group):
    """Verbs in the order in which they are used, not the alphabet's."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantkit")
@click.option("--debug", is_flag=True, help="Show tracebacks and details.")
def cli(debug: bool) -> None:
    """From a transformers checkpoint to the quantized variant to ship, with proof.

    Start with:  quantkit run quickstart
    """
    if debug:
        logging.basicConfig(stream=sys.stderr)
        logging.getLogger("quantkit").setLevel(logging.DEBUG)


@cli.command()
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), help="Default: runs/<recipe name>.")
@_SET
@_FORCE
@_JSON
def run(
    recipe: str, out: Path | None, overrides: tuple[str, ...], force: bool, as_json: bool
) -> None:
    """Convert, evaluate, bench and report, as RECIPE says (a shipped name or a YAML file).

    Interrupted, the same command goes on where it stopped.

    Example:  quantkit run quickstart --set source=./my-model --out runs/mine
    """
    from quantkit import pipeline
    from quantkit.cli import show
    from quantkit.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    directory = out or Path("runs") / loaded.name
    ledger = pipeline.run(loaded, directory, force=force)
    show.ledger(ledger, directory, as_json)
    if ledger.failed:
        sys.exit(1)


@cli.command()
@click.argument("recipe")
@_SET
@_JSON
def plan(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say what RECIPE will make: sizes, and what falls back to another type. Makes nothing.

    What others made is opened; exit code 1 where some of it cannot be measured.

    Example:  quantkit plan quickstart --set source=./my-model
    """
    from quantkit import pipeline
    from quantkit.cli import show
    from quantkit.recipe import load_recipe

    planned = pipeline.plan(load_recipe(recipe, overrides))
    show.plan(planned, as_json)
    for name, problem in planned.unusable.items():
        click.echo(f"quantkit: {name}: {problem}", err=True)
    if planned.unusable:
        sys.exit(1)


@cli.command()
@click.argument("model")
@click.option(
    "--to", "specs", multiple=True, required=True, metavar="SPEC", help="Such as gguf:Q4_K_M."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where to make them.")
@flags.calibration
@flags.producer
@flags.integers
@flags.gguf
@click.option(
    "--allow-requantize", is_flag=True, help="Take a GGUF that is quantized already as MODEL."
)
@click.option(
    "--allow-tokenizer-differences",
    is_flag=True,
    help="Make GGUF files with which llama.cpp reads some texts by other tokens than MODEL.",
)
@_FORCE
@_JSON
def convert(
    model: str, specs: tuple[str, ...], out: Path, force: bool, as_json: bool, **options: Any
) -> None:
    """Make variants of MODEL: a directory, a hub id, or demo:smollm2-135m.

    A GGUF file, F16 or the like, is a MODEL for other GGUF files. Options of a format hold for
    every --to of that format.

    Example:  quantkit convert ./my-model --to gguf:Q4_K_M --to awq:w4g128 --out variants
    """
    from quantkit.cli import show, verbs

    show.variants(verbs.convert(model, specs, out, force=force, **options), as_json)


@cli.command()
@_PATHS
@click.option("--reference", metavar="MODEL", help="The source, for drift: KLD and agreement.")
@click.option("--eval", "tasks", multiple=True, metavar="NAME", help="An lm-eval task or YAML.")
@click.option("--text", metavar="TEXT", help="Text for perplexity: a name or a file.")
@click.option("--context", default=512, show_default=True, help="Tokens a window.")
@click.option("--windows", type=int, help="How many windows; all of them by default.")
@click.option("--shots", type=int, help="Examples before each question.")
@click.option("--limit", type=int, help="Questions a task.")
@flags.verdicts
@click.option("--chat", is_flag=True, help="Questions in the model's chat template.")
@click.option(
    "--eval-data",
    "data",
    multiple=True,
    metavar="TASK=PATH",
    help="Local data of a task, such as mmlu_csv=DIR or wikitext_file=FILE.",
)
@click.option("--engine", help="transformers, llamacpp or vllm; by default one with full logits.")
@click.option("--prompts", metavar="FILE", help="Your own prompts, one JSON object a line.")
@click.option(
    "--max-answer-tokens",
    "answer_tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="The most tokens of an answer to a prompt.",
)
@_JSON
def evaluate(paths: tuple[str, ...], reference: str | None, as_json: bool, **options: Any) -> None:
    """Measure variants or checkpoints on the same tokens and questions.

    Example:  quantkit evaluate variants/* --reference ./my-model --eval mmlu --text wikitext-2:test
    """
    from quantkit.cli import show, verbs

    show.evaluated(verbs.evaluate(paths, reference, **options), as_json)


@cli.command()
@_PATHS
@flags.load
@_JSON
def bench(paths: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Serve each variant with its real engine and measure it under load.

    Example:  quantkit bench variants/* --concurrency auto --workload chat

    Example:  quantkit bench variants/gguf-Q4_K_M --slo ttft_ms=500,itl_ms=50
    """
    from quantkit.cli import show_load, verbs

    results = verbs.bench(paths, **options)
    show_load.results(results, as_json)
    if any(result.error for result in results.values()):
        sys.exit(1)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="RUN_DIR")
@flags.wants
@_JSON
def recommend(directory: Path, as_json: bool, **options: Any) -> None:
    """Say which variant of a run to ship, on which engine, from its ledger alone.

    Of all variants, the original among them, on every engine that served them: those that meet
    every limit beyond the noise; of these the one with the most output tokens a second at the
    highest concurrency; of those not told apart there, the nearest to the original; of those as
    near, the one that takes the least memory. Then: what the runner-up would cost, which limit
    binds, and what the data cannot decide. Exit code 1 where nothing meets every limit.

    Example:  quantkit recommend runs/mine --max-memory 6GiB --max-kld 0.05
    """
    from quantkit.recommend import command, show

    ledger, found = command.run(directory, **options)
    show.recommendation(ledger, found, as_json)
    if found.pick is None:
        sys.exit(1)


@cli.command()
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@flags.serving
def serve(paths: tuple[str, ...], **options: Any) -> None:
    """Serve variants behind an OpenAI-compatible API until Ctrl-C.

    One PATH: its engine answers itself. Several, or a gateway's option: one endpoint for all,
    which starts engines when they are asked for.

    Example:  quantkit serve variants/gguf-Q4_K_M variants/awq-w4g128 --alias fast=gguf-Q4_K_M
    """
    from quantkit.cli import verbs

    sys.exit(verbs.serve(paths, **options))


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="RUN_DIR")
def report(directory: Path) -> None:
    """Write report.html and report.md again from a run's ledger.json.

    Example:  quantkit report runs/quickstart
    """
    from quantkit import report as reports
    from quantkit.ledger import Ledger
    from quantkit.run import LEDGER

    click.echo(reports.write(Ledger.read(directory / LEDGER), directory))


@cli.command()
@click.argument("path")
@_JSON
def inspect(path: str, as_json: bool) -> None:
    """Say what PATH is: a checkpoint, a variant, or a bare GGUF file.

    Example:  quantkit inspect model-Q4_K_M.gguf
    """
    from quantkit.cli import show, verbs

    show.facts(verbs.inspect(path), as_json)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@_JSON
def verify(path: Path, as_json: bool) -> None:
    """Compare a variant's files with the hashes in its manifest.

    Example:  quantkit verify variants/gguf-Q4_K_M
    """
    from quantkit.cli import show
    from quantkit.variant import open_variant
    from quantkit.variant import verify as find_problems

    problems = find_problems(open_variant(path))
    show.problems(path, problems, as_json)
    if problems:
        sys.exit(1)


cli.add_command(engines)


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
    if isinstance(error, OSError) and error.filename is not None:  # the disk, permissions
        return 2, f"{error.filename}: {error.strerror}"
    return 1, (
        f"a bug in quantkit, not in what it was given: {type(error).__name__}: "
        f"{first_line(error)}; --debug shows where: please report it"
    )


def _interrupted() -> None:
    click.echo("quantkit: interrupted; the same command goes on from here", err=True)
    sys.exit(130)
