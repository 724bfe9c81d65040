"""llama.cpp's converter as the oracle for ours, and llama.cpp itself as the reader of our files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from quantkit.formats.gguf.header import read_header
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.native_gguf import NativeGGUF


def convert(checkpoint: Checkpoint, scheme: str, directory: Path) -> Path:
    """Our file of ``checkpoint`` in ``directory``, which is empty or not there yet."""
    directory.mkdir(exist_ok=True)
    NativeGGUF().convert(checkpoint, Spec("gguf", scheme), None, directory)
    (file,) = directory.iterdir()
    return file


def oracle(
    source: Path, jobs: list[tuple[Path, str, Path]], *options: str, tokenizer: bool = True
) -> None:
    """Run llama.cpp's converter for each (checkpoint, scheme, file to write), in one process.

    ``options`` are its own, as ``--vocab-only``; without ``tokenizer`` it leaves out these keys.
    """
    arguments = (json.dumps(value, default=str) for value in (jobs, options, tokenizer))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("converter_process.py"), *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (source, source / "gguf-py"))),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def assert_same_gguf(ours: Path, theirs: Path, *, but: tuple[str, ...] = ()) -> None:
    """Same metadata (in any order, without the keys that begin with ``but``), same tensors in the
    same order, same bytes."""
    a, b = read_header(ours), read_header(theirs)
    keys = {key for key in a.metadata | b.metadata if not key.startswith(but)}
    assert {k for k in keys if a.metadata.get(k) != b.metadata.get(k)} == set()
    assert a.tensors == b.tensors
    assert ours.read_bytes()[a.data_offset :] == theirs.read_bytes()[b.data_offset :]


@contextmanager
def loaded(path: Path, **options: Any) -> Iterator[llama_cpp.Llama]:
    """A GGUF in llama.cpp, in this process."""
    model = llama_cpp.Llama(str(path), verbose=False, n_threads=2, **options)
    try:
        yield model
    finally:
        model.close()


def tool(name: str, *arguments: Any) -> None:
    """Run one of llama.cpp's own programs, which lie beside llama-cpp-python."""
    packages = Path(llama_cpp.__file__).parents[1]
    program = packages / "bin" / name
    if not program.is_file():
        pytest.skip(f"{program}: llama-cpp-python was built without its tools")
    done = subprocess.run(
        [program, *map(str, arguments)],
        env={**os.environ, "LD_LIBRARY_PATH": str(packages / "lib")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-1000:]
