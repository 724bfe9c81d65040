"""Directories and files that exist whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError, did_you_mean
from quantkit.system.files import new_directory, remove_partials, sha256_json, write_json


def test_a_directory_appears_at_the_end_only(tmp_path: Path) -> None:
    final = tmp_path / "v"
    with new_directory(final) as partial:
        (partial / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["v"]


def test_an_error_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    final = tmp_path / "v"
    with new_directory(final) as partial:
        (partial / "a").write_text("old")

    def replace_and_fail() -> None:
        with new_directory(final, force=True) as partial:
            (partial / "a").write_text("new")
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        replace_and_fail()
    assert (final / "a").read_text() == "old"
    with pytest.raises(QuantkitError, match="exists already"), new_directory(final):
        pass
    with new_directory(final, force=True) as partial:
        (partial / "b").write_text("new")
    assert [p.name for p in final.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["v"]


def test_a_killed_process_leaves_only_what_the_next_one_removes(tmp_path: Path) -> None:
    script = (
        "import os, signal, pathlib\n"
        "from quantkit.system.files import new_directory\n"
        f"with new_directory(pathlib.Path({str(tmp_path / 'v')!r})) as p:\n"
        "    (p / 'a').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], env=dict(os.environ), check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "v").exists()
    assert len(list(tmp_path.iterdir())) == 1
    remove_partials(tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


def test_json_refuses_what_is_not_a_number(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1.5})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1.5}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_json_hashes_do_not_depend_on_order() -> None:
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})


def test_did_you_mean() -> None:
    assert did_you_mean("q4_k_m", ["Q4_K_M", "Q4_K_S"]) == "; did you mean 'Q4_K_M'?"
    assert did_you_mean("zzz", ["Q4_K_M"]) == ""
