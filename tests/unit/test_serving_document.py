"""What docs/serving.md shows can be used as it stands, as far as that is seen without root."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.cli.main import serve
from quantkit.gateway.config import Limits

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return str(found)


def parses(words: list[str]) -> None:
    assert words[0].endswith("quantkit")
    assert words[1] == "serve"
    serve.make_context("serve", words[2:])  # raises UsageError for what it does not know


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    file = tmp_path / "quantkit.service"
    # That there is such a program on this machine is all that is not verified.
    file.write_text(block("ini").replace("/opt/quantkit/bin/quantkit", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(file)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_starts_a_gateway_and_waits_until_it_has_drained() -> None:
    unit = dict(line.split("=", 1) for line in block("ini").splitlines() if "=" in line)
    parses(shlex.split(unit["ExecStart"]))
    assert int(unit["TimeoutStopSec"]) > Limits().drain_seconds + 25  # and engines have ended


def test_the_container_starts_a_gateway() -> None:
    lines = re.sub(r"\\\n", " ", block("dockerfile")).splitlines()
    instructions = {word: rest for word, _, rest in (line.partition(" ") for line in lines)}
    assert set(instructions) <= {
        "FROM", "RUN", "COPY", "ENV", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT",
        "CMD",
    }  # fmt: skip
    parses([*json.loads(instructions["ENTRYPOINT"]), *json.loads(instructions["CMD"])])
    program, option, code = json.loads(instructions["HEALTHCHECK"].removeprefix("CMD "))
    assert (program, option) == ("python", "-c")
    ast.parse(code)
    assert f":{instructions['EXPOSE']}/health/ready" in code
    target = re.search(r"make (\w+) VENV=(\S+)", block("dockerfile"))
    assert target is not None
    assert f"\n{target[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"PATH={target[2]}/bin:" in instructions["ENV"]
