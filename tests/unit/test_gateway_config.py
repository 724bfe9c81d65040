from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from quantkit.cli.main import serve
from quantkit.errors import RecipeError
from quantkit.gateway.command import ServeCommand, best_and_fast, gateway_config, run
from quantkit.gateway.config import GatewayConfig, load_config
from quantkit.models.engine_config import EngineConfig, options_of, words
from quantkit.recommendation import recommend
from quantkit.system.sizes import parse_size
from tests.ledger_rows import DOCS, with_metrics
from tests.ledgers import quickstart, swept, with_row

FILE = """\
port: 9000
memory_budget: 8GiB
backends:
  laptop: {path: models/small.gguf, slots: 2}
  farm:
    url: http://gpu-1:8000/v1
    api_key_env: GPU_KEY
    model: big
models:
  assistant:
    - {priority: [batch, low], backend: farm}
    - {prompt_characters_over: 8000, running_over: 4, backend: [farm, laptop]}
    - {backend: laptop}
aliases: {fast: assistant}
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "gateway.yaml"
    file.write_text(text)
    return file


def test_a_whole_file(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small.gguf").touch()
    config = load_config(write(tmp_path, FILE), {"port": 9001, "host": None})
    assert (config.host, config.port, config.memory_budget) == ("127.0.0.1", 9001, 8 << 30)
    assert config.backends["laptop"].path == str(tmp_path / "models" / "small.gguf")
    rules = config.models["assistant"]
    assert [rule.always for rule in rules] == [False, False, True]
    assert rules[1].backend == ["farm", "laptop"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "slots",
            "slot",
            r"gateway.yaml:4: unknown key 'backends.laptop.slot'; keys here are path",
        ),
        ("slots: 2", "slots: 0", r":4: backends.laptop.slots: Input should be greater.*, not 0"),
        (
            "priority",
            "prio",
            r":11: unknown key 'models.assistant.0.prio'.*did you mean 'priority'",
        ),
        ("8GiB", "8 bytes", r":2: memory_budget: expected a size such as 8GiB .*'8 bytes'"),
        ("backend: laptop}", "backend: labtop}", r"no backend 'labtop'.*did you mean 'laptop'"),
        ("{backend: laptop}", "{priority: x, backend: laptop}", "the last rule, and only that"),
        ("fast: assistant", "fast: x", "aliases.fast: no model 'x'; models are assistant"),
        ("fast: assistant", "assistant: assistant", "aliases.assistant: is the name of a model"),
        ("url: http", "path: x\n    url: http", ":5: backends.farm: expected either `path` or"),
        ("url: http://gpu-1", "url: ftp://x", r":6: backends.farm.url: String should match"),
        ("model: big", "engine: vllm", r":5: backends.farm: `engine` is for a `path`"),
        ("slots: 2", "model: x", r":4: backends.laptop: .* are for a `url`"),
        ("slots: 2", "engine: {name: vllm, port: 1}", r"'port' is decided by quantkit"),
        (
            "slots: 2",
            "engine: {name: vllm, 'a b': 1}",
            r"'a b' is not the name of an engine's option",
        ),
        ("port: 9000", "port: 0", r":1: port: "),
        ("backends:", "backend:", r":3: unknown key 'backend'.*did you mean 'backends'"),
        ("port: 9000", "[", "not YAML"),
    ],
)
def test_what_is_wrong_is_told_by_line_and_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    file = write(tmp_path, FILE.replace(old, new, 1))
    with pytest.raises(RecipeError, match=message) as caught:
        load_config(file, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("500M", 500_000_000), ("1.5 GB", 1_500_000_000), (7, 7), ("2kib", 2048)],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", 0, True, None, "8 GiBs", "1e9"])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)


def test_every_backend_is_a_model_by_default() -> None:
    config = GatewayConfig.model_validate({"backends": {"a": {"path": "x"}, "b": {"path": "y"}}})
    assert {name: rules[0].backend for name, rules in config.models.items()} == {
        "a": ["a"],
        "b": ["b"],
    }


def test_engine_arguments() -> None:
    assert words({"tensor_parallel_size": 2, "enforce-eager": True, "x": False, "y": "a b"}) == [
        "--tensor-parallel-size", "2", "--enforce-eager", "--y", "a b",
    ]  # fmt: skip
    assert options_of(["tensor-parallel-size=2", "enforce-eager"], "--engine-arg") == {
        "tensor-parallel-size": "2",
        "enforce-eager": True,
    }
    with pytest.raises(RecipeError, match="--engine-arg: 'api_key' is decided by quantkit"):
        options_of(["api_key=x"], "--engine-arg")


def variant(tmp_path: Path, name: str) -> str:
    """Something that opens as a variant; nothing here starts an engine."""
    directory = tmp_path / name
    directory.mkdir(parents=True)
    config = '{"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64}}'
    (directory / "config.json").write_text(config)
    return str(directory)


def test_the_command_line_makes_the_same_configuration(tmp_path: Path) -> None:
    paths = [variant(tmp_path, "one"), variant(tmp_path, "two")]
    config = gateway_config(
        ServeCommand(
            paths, aliases=["fast=two"], memory_budget="2GiB", slots=8, preload=True,
            engine_options={"pipeline-parallel-size": "2"},
        )
    )  # fmt: skip
    assert list(config.models) == ["one", "two"]
    assert config.aliases == {"fast": "two"}
    assert config.memory_budget == 2 << 30
    two = config.backends["two"]
    assert (two.slots, two.preload) == (8, True)
    assert two.engine is not None
    assert two.engine.options == {"pipeline_parallel_size": "2"}


def test_options_that_are_no_good(tmp_path: Path) -> None:
    paths = [variant(tmp_path, "one"), variant(tmp_path, "two")]
    file = write(tmp_path, FILE)
    for command, message in (
        (ServeCommand(paths, aliases=["fast"]), "--alias 'fast': expected NAME=MODEL"),
        (ServeCommand(paths, aliases=["fast=x"]), "aliases.fast: no model 'x'"),
        (ServeCommand(paths, memory_budget="x"), "--memory-budget: expected a size"),
        (ServeCommand([paths[0], paths[0]]), "are both called one"),
        (ServeCommand(), "nothing to serve"),
        (ServeCommand(paths, config=file), "--config says what is served"),
        (ServeCommand(config=tmp_path / "none.yaml"), "no such file"),
        (ServeCommand(paths, host="0.0.0.0"), "give --api-key, or set QUANTKIT_API_KEY"),
        (ServeCommand(paths[:1], host="0.0.0.0"), "give --api-key, or set QUANTKIT_API_KEY"),
        (
            ServeCommand(paths[:1], engine_options={"vllm.port": "1"}),
            "engine option vllm.port: 'port' is decided by",
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            run(command)


def test_one_path_is_loaded_at_the_start(tmp_path: Path) -> None:
    one, two = variant(tmp_path, "one"), variant(tmp_path, "two")
    config = gateway_config(ServeCommand([one], slots=2, context=64, engine="vllm"))
    backend = config.backends["one"]
    assert (backend.preload, backend.slots, backend.context, backend.engine) == (
        True, 2, 64, EngineConfig(name="vllm"),
    )  # fmt: skip
    assert gateway_config(ServeCommand([one], aliases=["a=one"])).backends["one"].preload
    several = gateway_config(ServeCommand([one, two])).backends
    assert not any(backend.preload for backend in several.values())


def test_names_of_a_run() -> None:
    """Counted by hand over the rows of a ledger."""
    found = quickstart()
    rows = [row for row in found.variants[1:] if not row.failed]
    names = best_and_fast(found)
    assert names["best"].texts[DOCS].metrics["kld_mean"].value == min(
        row.texts[DOCS].metrics["kld_mean"].value for row in rows
    )
    level = max(bench.concurrency for row in rows for bench in row.bench)
    speeds = {b.output_tokens_per_s: r.id for r in rows for b in r.bench if b.concurrency == level}
    assert names["fast"].id == speeds[max(speeds)]


def test_a_run_serves_what_is_recommended_on_its_engine(tmp_path: Path) -> None:
    pick = recommend(swept()).pick
    assert pick is not None
    assert pick.candidate.key == ("gguf-Q4_K_M", "llamacpp")
    swept().write(tmp_path / "ledger.json")
    for row in swept().variants[1:]:
        variant(tmp_path / "variants", row.id)
    config = gateway_config(ServeCommand(from_run=tmp_path))
    assert config.aliases == {
        "recommended": "gguf-Q4_K_M", "best": "gguf-F16", "fast": "gptq-w4g64",
    }  # fmt: skip
    assert config.backends["gguf-Q4_K_M"].engine == EngineConfig(name="llamacpp")
    assert set(config.models) == {row.id for row in swept().variants[1:]}
    # What the command line says of engines holds for all.
    assert gateway_config(
        ServeCommand(from_run=tmp_path, engine="llamacpp")
    ).backends["gptq-w4g64"].engine == EngineConfig(name="llamacpp")  # fmt: skip


def test_a_run_serves_the_reference_only_where_that_is_recommended(tmp_path: Path) -> None:
    source = Path(variant(tmp_path, "source"))
    found = with_row(swept(), 0, path=str(source))
    far = found.variants[1].texts[DOCS].metrics["kld_mean"].model_copy(update={"value": 1.0})
    rows = [row if row.id == "reference" else with_metrics(row, kld_mean=far)
            for row in found.variants]  # fmt: skip
    found = found.model_copy(update={"variants": rows})
    found.write(tmp_path / "ledger.json")
    for row in found.variants[1:]:
        variant(tmp_path / "variants", row.id)
    config = gateway_config(ServeCommand(from_run=tmp_path))
    assert config.aliases["recommended"] == "reference"
    assert config.backends["reference"].path == str(source)


def test_the_files_in_the_documentation_are_valid(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    files = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(files) >= 2
    for file in files:
        load_config(write(tmp_path, file), {})
    commands = re.findall(r"^quantkit serve (.*)$", text, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        serve.make_context("serve", shlex.split(command))
