"""``import quantkit as qk``: what it gives, and what it costs."""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

import quantkit as qk
from quantkit.cli import main as command_line
from quantkit.system import progress
from quantkit.system.table import Table
from tests import ledgers

T = TypeVar("T")


def test_api_is_lazy() -> None:
    script = (
        "import sys; before = set(sys.modules); import quantkit as qk; qk.convert, qk.Spec\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not set(done.stdout.split()) & {
        "torch", "transformers", "pydantic", "numpy", "gguf", "llama_cpp", "rich", "click",
    }  # fmt: skip


def test_api_has_every_name_whatever_was_imported() -> None:
    """No room is called like a function: importing it would take its place."""
    rooms = {path.name for path in Path(qk.__file__).parent.iterdir() if path.is_dir()}
    assert not rooms & set(qk.__all__)
    for name in qk.__all__:
        assert getattr(qk, name) is not None
    assert {"bench", "run", "serve", "Ledger"} <= set(dir(qk))
    with pytest.raises(AttributeError, match="no attribute 'bnech'"):
        qk.bnech  # noqa: B018
    assert issubclass(qk.RecipeError, qk.QuantkitError)


def test_what_is_refused_is_not_read(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread is left that would hold the process until a large source is hashed."""
    hashed: list[object] = []
    monkeypatch.setattr("quantkit.models.checkpoint.sha256_files", hashed.append)
    before = set(threading.enumerate())
    with pytest.raises(qk.QuantkitError, match="Q4_KM"):
        qk.convert(tiny_llama, ["gguf:Q4_KM"], tmp_path / "out")
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert not hashed


def test_the_command_line_calls_the_api_alone() -> None:
    """Of the package, ``cli/main.py`` runs nothing but ``api``: all else parses or prints."""
    tree = ast.parse(Path(command_line.__file__).read_text(encoding="utf-8"))
    modules = {
        node.module for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("quantkit.")
    }  # fmt: skip
    rooms = {module.split(".")[1] for module in modules}
    assert rooms <= {"cli", "errors", "ledger", "models", "system", "version"}


def test_api_makes_measures_and_describes(tiny_llama: Path, tmp_path: Path) -> None:
    made = qk.convert(tiny_llama, ["gguf:Q8_0", qk.Spec.parse("gguf:Q4_0")], tmp_path)
    assert [variant.id for variant in made] == ["gguf-Q8_0", "gguf-Q4_0"]
    assert qk.open(made[0].path) == made[0]
    assert qk.verify(made[0].path) == []
    facts = qk.inspect(made[0].path)
    assert facts["file_type"] == "Q8_0"
    assert "file_type" in str(facts)
    found = qk.evaluate(
        [one.path for one in made], tiny_llama, texts=["pydoc:evaluation"], windows=2, context=64
    )
    kld = {name: found.models[name].texts["pydoc:evaluation"].metrics["kld_mean"].value
           for name in ("gguf-Q8_0", "gguf-Q4_0")}  # fmt: skip
    assert 0 < kld["gguf-Q8_0"] < kld["gguf-Q4_0"]
    frame = found.to_pandas()
    row = frame[(frame.variant == "gguf-Q4_0") & (frame.metric == "kld_mean")]
    assert row["value"].item() == kld["gguf-Q4_0"]


def test_api_says_what_is_wrong_in_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(qk.RecipeError, match=r"^windos: .*did you mean 'windows'\?$"):
        qk.evaluate([tiny_llama], windos=8)
    with pytest.raises(qk.RecipeError, match=r"^seconds: Input should be greater than 0$"):
        qk.bench([tiny_llama], seconds=0)
    with pytest.raises(qk.RecipeError, match="unknown format 'gptw'"):
        qk.convert(tiny_llama, ["gptw:w4g64"], tmp_path)
    with pytest.raises(qk.CheckpointError, match="no such directory"):
        qk.open(tmp_path / "nothing here")
    with pytest.raises(qk.RecipeError, match="overrides are for recipes in files"):
        qk.plan(qk.recipe("quickstart"), "bench=null")


def test_plan_of_a_recipe_prints(tiny_llama: Path) -> None:
    planned = qk.plan("quickstart", f"source={tiny_llama}", "convert=[gguf:Q8_0]")
    assert str(planned).splitlines()[0].split()[:3] == ["variant", "spec", "bytes"]
    assert planned.to_pandas().bytes.tolist() == [planned.bytes]


def test_ledger_and_recommendation_print(tmp_path: Path) -> None:
    ledger = ledgers.swept()
    ledger.write(tmp_path / "ledger.json")
    assert qk.Ledger.of_run(tmp_path) == ledger
    frame = ledger.to_pandas()
    assert frame.variant.tolist() == [row.id for row in ledger.variants]
    first = ledger.variants[1].bench[0]
    column = f"output_tokens_per_s {first.engine.id} @{first.concurrency}"
    assert frame[column][1] == first.output_tokens_per_s
    pick = qk.recommend(tmp_path).pick
    assert pick is not None
    told = str(qk.recommend(ledger)).splitlines()[1].split()
    assert told[:2] == ["ship", pick.candidate.row.id]
    assert len(qk.profiles(ledger)) == 3
    assert qk.report(tmp_path) == tmp_path / "report.html"


def test_table_is_text_and_escaped_html() -> None:
    table = Table.of_records([{"a": "<b>", "n": 0.123456}, {"a": "x", "m": 3}])
    assert str(table).splitlines() == ["a         n  m", "<b>  0.1235  –", "x         –  3"]
    assert "<td>&lt;b&gt;</td><td>0.1235</td><td>–</td>" in table.html()


def test_the_page_on_python_names_what_is_there() -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    used = {
        node.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "qk"
    }
    listed = set(re.findall(r"`(\w+)\([^)]*\)`", page.partition("| function |")[2]))
    functions = {name for name in qk.__all__ if name.islower() and not name.startswith("_")}
    assert used | listed <= set(qk.__all__)
    assert listed == functions - {"show_progress"}


class _Heard(progress.Progress):
    def __init__(self) -> None:
        self.loops: list[tuple[str, int]] = []

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        self.loops.append((what, total))
        yield from items


def test_progress_can_be_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard = _Heard()
    monkeypatch.setattr(progress, "_current", heard)
    assert list(progress.track("abc", "letters")) == ["a", "b", "c"]
    assert heard.loops == [("letters", 3)]
    assert list(progress.Progress().track("ab", "letters", 2)) == ["a", "b"]
    monkeypatch.setattr(logging.getLogger("quantkit"), "propagate", True)
    with caplog.at_level(logging.INFO, "quantkit"):
        progress.say("50 % of [it]")
    assert set(caplog.messages) == {"50 % of [it]"}


def test_a_library_is_silent() -> None:
    script = "from quantkit.system.progress import say, track; say('x'); list(track([1], 'y'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout + done.stderr == b""
