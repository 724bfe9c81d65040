"""A package of somebody else's that brings an engine and a producer, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_MODULE = '''
"""An engine that is transformers under another name, and a producer that rounds to nearest."""

from quantkit.engines.transformers import Transformers
from quantkit.producers.native_gptq import NativeGPTQ


class Mirror(Transformers):
    name = "mirror"


class Plain(NativeGPTQ):
    resumes = False

    def plan(self, checkpoint, spec):
        spec.known_options(())
        return super().plan(checkpoint, spec)
'''
_POINTS = """\
[quantkit.engines]
mirror = quantkit_mirror:Mirror
broken = quantkit_mirror:Nothing

[quantkit.producers]
plain = quantkit_mirror:Plain
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installed as pip does: a module, and a directory of what the package says of itself."""
    place = tmp_path_factory.mktemp("site")
    (place / "quantkit_mirror.py").write_text(_MODULE)
    info = place / "quantkit_mirror-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quantkit-mirror\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(_POINTS)
    return place


def quantkit(site: Path | None, *words: str) -> subprocess.CompletedProcess[str]:
    paths = [str(site)] if site else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *filter(None, sys.path)])}
    command = [sys.executable, "-m", "quantkit", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def test_plugins_make_and_measure(site: Path, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = quantkit(
        site, "convert", str(tiny_llama), "--to", "gptq:w4g64", "--producer", "plain",
        "--out", str(out), "--samples", "4", "--sequence-length", "64", "--json",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    manifest = json.loads((out / "gptq-w4g64-plain" / "quantkit.json").read_text())
    assert manifest["spec"]["producer"] == "plain"
    measured = quantkit(
        site, "evaluate", str(out / "gptq-w4g64-plain"), "--reference", str(tiny_llama),
        "--engine", "mirror", "--text", "pydoc:evaluation", "--windows", "2", "--json",
    )  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    found = json.loads(measured.stdout)["models"]["gptq-w4g64-plain"]
    kld = found["texts"]["pydoc:evaluation"]["metrics"]["kld_mean"]
    assert kld["engine"]["name"] == "mirror"
    assert kld["value"] > 0


def test_plugins_are_named_where_something_is_unknown(site: Path, tiny_llama: Path) -> None:
    words = ["evaluate", str(tiny_llama), "--text", "pydoc:evaluation", "--engine", "miror"]
    with_it, without = quantkit(site, *words), quantkit(None, *words)
    assert with_it.stderr.strip().endswith("did you mean 'mirror'?")
    assert "mirror" not in without.stderr
    assert with_it.returncode == without.returncode == 2


def test_plugin_that_does_not_load_is_one_line(site: Path, tiny_llama: Path) -> None:
    words = ["evaluate", str(tiny_llama), "--text", "pydoc:evaluation", "--engine", "broken"]
    told = quantkit(site, *words)
    (line,) = told.stderr.strip().splitlines()
    assert line.startswith("quantkit: plugin quantkit_mirror:Nothing: module 'quantkit_mirror' has")
