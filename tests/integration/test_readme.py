"""What README's first screen promises: its three commands, as they stand there, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from quantkit import toolchains
from quantkit.engines.process import check_port
from quantkit.errors import EngineError, ToolchainError
from quantkit.ledger import Ledger
from tests.integration.gateways import wait_until
from tests.models import make_checkpoint
from tests.vllm_kernels import needs_integer_kernels

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000/v1"


def _own_model() -> list[list[str]]:
    """The commands of the first screen for a model of one's own, as words."""
    first_screen = README.partition("\n## ")[0]
    (block,) = re.findall(r"own model.*?```\n(.*?)```", first_screen, re.DOTALL)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def _ask(path: str, body: object = None) -> dict[str, object]:
    request = urllib.request.Request(
        ADDRESS + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, object] = json.load(answer)
        return found


@needs_integer_kernels
def test_first_screen_quantizes_and_serves_a_model_of_ones_own(tmp_path: Path) -> None:
    try:
        toolchains.find("vllm")
        check_port("127.0.0.1", 8000)
    except (ToolchainError, EngineError) as error:
        pytest.skip(str(error))
    make_checkpoint(tmp_path / "my-model")
    environment = {name: value for name, value in os.environ.items() if name != "QUANTKIT_API_KEY"}
    (plan, run, serve) = _own_model()
    quantkit = [sys.executable, "-m", "quantkit"]

    def give(words: list[str]) -> str:
        assert words[0] == "quantkit"
        ended = subprocess.run(
            [*quantkit, *words[1:]],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    planned = give(plan)
    assert list(tmp_path.iterdir()) == [tmp_path / "my-model"]
    said = give(run)
    report = Path(said.rpartition("report: ")[2].strip())
    assert report == tmp_path / "runs" / "mine" / "report.html"
    assert report.is_file()
    rows = Ledger.read(report.with_name("ledger.json")).variants
    made = [row.id for row in rows if row.id != "reference"]
    assert len(made) == 5
    assert all(re.search(rf"^{name} ", planned, re.MULTILINE) for name in made)

    log = tmp_path / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*quantkit, *serve[1:]], cwd=tmp_path, env=environment, stdout=output, stderr=output
        )
    try:
        wait_until(lambda: server.poll() is not None or "ready: " in log.read_text())
        assert server.poll() is None, log.read_text()
        served = _ask("/models")["data"]
        assert isinstance(served, list)
        assert {*made, "best", "fast"} <= {model["id"] for model in served}
        answer = _ask("/completions", {"model": "gguf-Q4_K_M", "prompt": "a", "max_tokens": 4})
        assert answer["choices"]
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
