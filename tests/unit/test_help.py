"""What the command line says of itself: every command and every option explains itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from quantkit.benchmark.section import BenchSection
from quantkit.cli.main import cli
from quantkit.data.section import CalibrationSection
from quantkit.evaluation.section import EvaluateSection
from quantkit.gateway.config import Backend, GatewayConfig
from quantkit.producers.linear_options import CLOSED_FORM, ITERS
from quantkit.recommendation import ACCEPTED
from quantkit.system.devices import AUTO


def _commands(group: click.Group, *words: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, *words, name)
        else:
            yield (*words, name), command


COMMANDS = dict(_commands(cli))
OPTIONS = [
    pytest.param(words, option, id=" ".join([*words, option.opts[-1]]))
    for words, command in COMMANDS.items()
    for option in command.params
    if isinstance(option, click.Option)
]


def _shown(*words: str) -> str:
    done = CliRunner().invoke(cli, list(words), prog_name="quantkit", env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    return done.output


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from quantkit.cli.main import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich', 'yaml', 'lm_eval'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "heavy: []" in ended.stdout


def test_bare_command_shows_the_four_to_begin_with() -> None:
    lines = _shown().splitlines()
    commands = [line.split()[:2] for line in lines if line.startswith("  quantkit ")]
    assert commands == [["quantkit", verb] for verb in ("plan", "run", "recommend", "serve")]


def test_overview_names_every_command_whole_on_eighty_columns() -> None:
    for group in ((), ("engines",)):
        shown = _shown(*group, "--help")
        assert "…" not in shown
        assert "..." not in shown.replace("[ARGS]...", "")
    for words in COMMANDS:
        assert f"\n  {words[-1]} " in _shown(*words[:-1], "--help")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_has_a_summary_an_example_and_named_arguments(words: tuple[str, ...]) -> None:
    shown = " ".join(_shown(*words, "--help").split())
    assert f"Example: quantkit {' '.join(words)}" in shown
    for parameter in COMMANDS[words].params:
        if isinstance(parameter, click.Argument):
            assert parameter.help  # type: ignore[attr-defined]


@pytest.mark.parametrize(("words", "option"), OPTIONS)
def test_option_says_what_it_is_with_unit_default_and_example(
    words: tuple[str, ...], option: click.Option
) -> None:
    text = option.help or ""
    assert text[0].isupper(), text
    assert text.endswith("."), text
    assert len(text.split()) >= 4, text
    assert option.group is not None, "in no group"  # type: ignore[attr-defined]
    if option.is_flag:
        return
    stated = isinstance(option.show_default, str) or isinstance(option.default, str | int | float)
    assert stated or option.required or option.multiple, "no default is stated"
    assert option.metavar or isinstance(option.type, click.Choice), "no name for its value"
    form = option.metavar or ""
    if "=" in form or form in ("LIMITS", "SIZE", "N,...", "SPEC"):
        assert "such as" in text, "a value with a form needs an example"
    if option.multiple:
        assert "May be repeated." in text


def _stated(verb: str, flag: str) -> str:
    option = next(p for p in cli.commands[verb].params if flag in p.opts)
    assert isinstance(option, click.Option)
    return str(option.show_default if isinstance(option.show_default, str) else option.default)


@pytest.mark.parametrize(
    ("verb", "flag", "holds"),
    [
        ("convert", "--calibration", CalibrationSection().text),
        ("convert", "--samples", CalibrationSection().samples),
        ("convert", "--sequence-length", CalibrationSection().sequence_length),
        ("convert", "--seed", CalibrationSection().seed),
        ("convert", "--device", AUTO),
        ("convert", "--rounding", CLOSED_FORM),
        ("convert", "--iters", ITERS),
        ("evaluate", "--context", EvaluateSection().context),
        ("evaluate", "--max-answer-tokens", EvaluateSection().answer_tokens),
        ("evaluate", "--tolerance", EvaluateSection().tolerance),
        ("bench", "--concurrency", ",".join(map(str, BenchSection().concurrency))),
        ("bench", "--arrivals", BenchSection().arrivals),
        ("bench", "--seconds", f"{BenchSection().seconds:g}"),
        ("bench", "--repetitions", BenchSection().repetitions),
        ("bench", "--prompt-tokens", BenchSection().lengths[0]),
        ("bench", "--output-tokens", BenchSection().lengths[1]),
        (
            "recommend",
            "--max-kld",
            "{laptop:g} (laptop), {server:g} (server) or {quality:g} (quality) times the run's "
            "tolerance in perplexity, as KL divergence; none with --max-drop".format(**ACCEPTED),
        ),
        ("serve", "--host", GatewayConfig.model_fields["host"].default),
        ("serve", "--port", GatewayConfig.model_fields["port"].default),
        ("serve", "--slots", Backend.model_fields["slots"].default),
    ],
)
def test_stated_default_is_the_one_that_holds(verb: str, flag: str, holds: object) -> None:
    assert _stated(verb, flag) == str(holds)
