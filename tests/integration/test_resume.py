"""A conversion that is killed goes on from its last finished block, to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.models import make_checkpoint

KILLS = 10
"""Of each of the four."""

_DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)  # threads do not survive a fork
from quantkit.data.calibration import calibrate
from quantkit.models.checkpoint import Checkpoint
from quantkit.producers.convert import convert
from quantkit.models.spec import Spec
from quantkit.data.texts import load_text
from quantkit.system.progress import to_terminal

to_terminal()
source, out, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[4])
spec = Spec.of_entry(json.loads(sys.argv[3]))
checkpoint = Checkpoint.open(source)
windows = calibrate(
    load_text("pydoc:calibration"), checkpoint.tokenizer, samples=8, sequence_length=64, seed=0
)
final = out / "again" / spec.directory
whole = convert(checkpoint, spec, windows, out / "once").path
started = time.monotonic()  # the first time, much is loaded that a child finds there
convert(checkpoint, spec, windows, out / "timed")
took = time.monotonic() - started

def content(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != "quantkit.json"}

def manifest(path):
    told = json.loads((path / "quantkit.json").read_text())
    del told["created_at"], told["convert"]
    return told

random.seed(0)
killed = resumed = completed = 0
while killed < kills or not completed:
    child = os.fork()
    if child == 0:
        convert(checkpoint, spec, windows, out / "again")
        os._exit(0)
    if killed < kills:
        time.sleep(random.uniform(0, took))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    if not final.exists():
        left = list((out / "again").iterdir())
        assert len(left) <= 1, left
        resumed += any((path / "finished-blocks.json").is_file() for path in left)
        continue
    completed += 1
    assert content(final) == content(whole)
    for key, value in manifest(whole).items():
        assert manifest(final)[key] == value, (key, manifest(final)[key], value)
    assert [p.name for p in (out / "again").iterdir()] == [final.name]
    for path in final.iterdir():
        path.unlink()
    final.rmdir()
print(json.dumps({"killed": killed, "resumed": resumed, "completed": completed}))
"""


@pytest.mark.parametrize(
    ("entry", "model"),
    [
        ({"spec": "gptq:w4g64"}, {"family": "llama"}),
        ({"spec": "awq:w4g64"}, {"family": "llama"}),
        (
            {"spec": "gptq:w4g64", "rounding": "learned", "iters": 4, "skip": "layers.2.*o_proj"},
            {"family": "llama"},
        ),
        ({"spec": "gptq:w4g64"}, {"family": "mixtral", "num_local_experts": 3}),
    ],
    ids=["gptq", "awq", "learned", "experts"],
)
def test_killed_at_random_points_it_gives_the_same_bits(
    entry: dict[str, Any], model: dict[str, Any], tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "model", num_hidden_layers=7, **model)
    argv = [sys.executable, "-c", _DRIVER, source, tmp_path, json.dumps(entry), KILLS]
    argv = [str(argument) for argument in argv]
    ended = subprocess.run(argv, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    counts = json.loads(ended.stdout)
    assert counts["killed"] == KILLS
    assert counts["completed"] >= 1
    assert counts["resumed"] >= KILLS // 3, counts
    assert "blocks are in" in ended.stderr


_FULL = """
import resource, sys
from pathlib import Path
from quantkit.data.calibration import calibrate
from quantkit.models.checkpoint import Checkpoint
from quantkit.producers.convert import convert
from quantkit.errors import ConversionError
from quantkit.formats import shards
from quantkit.models.spec import Spec
from quantkit.data.texts import load_text

source, out = Checkpoint.open(sys.argv[1]), Path(sys.argv[2])
shards._SHARD_BYTES = 400_000  # several files, of which the first ones find room
windows = calibrate(
    load_text("pydoc:calibration"), source.tokenizer, samples=8, sequence_length=64, seed=0
)
spec = Spec.parse("awq:w4g64")
whole = convert(source, spec, windows, out / "once").path
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
room = max(p.stat().st_size for p in whole.glob("*.safetensors")) - 1
resource.setrlimit(resource.RLIMIT_FSIZE, (room, unlimited[1]))
try:
    convert(source, spec, windows, out / "again")
except ConversionError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
print(len(list((out / "again").iterdir())))
again = convert(source, spec, windows, out / "again").path
for path in whole.iterdir():
    assert path.name == "quantkit.json" or path.read_bytes() == (again / path.name).read_bytes()
assert [p.name for p in (out / "again").iterdir()] == [again.name]
"""


def test_out_of_disk_it_says_so_and_then_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", num_hidden_layers=3)
    # A limit on the size of files fails writes as a full disk does.
    argv = [sys.executable, "-c", _FULL, str(source), str(tmp_path)]
    ended = subprocess.run(argv, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    message, left = ended.stdout.splitlines()
    assert "awq:w4g64: writing" in message
    assert "continue from the last finished block" in message
    assert int(left) <= 1
