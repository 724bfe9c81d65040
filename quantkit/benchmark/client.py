"""GuideLLM as a process that runs one load after another: a script that is given a directory.

It writes ``ready`` there when it can begin, waits for ``1.json``, ``2.json`` … (GuideLLM's
scenarios), runs each when it appears, and
renames what GuideLLM wrote to ``N-report.json``; where GuideLLM fails, ``N-error.txt`` says why.
Importing GuideLLM takes seconds, and so does each of its workers: here both happen once, because
workers are forked from a server that has imported it already. What this module sets right in
GuideLLM holds for them too: each runs it, as multiprocessing does with the main module.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

from guidellm.backends.openai.http import OpenAIHTTPBackend

_PRELOADED = ["guidellm.scheduler.worker", "guidellm.backends", "guidellm.backends.openai.http"]
_SECONDS_BETWEEN_LOOKS = 0.05


async def lines(_: Any, stream: Any) -> AsyncIterator[str]:
    """The lines of an event stream that are not empty; a line feed ends each.

    GuideLLM takes httpx's lines, which also end at Unicode separators (U+0085, U+2028): one of
    these inside a token would cut an event in two, and count as a fault of the server."""
    left = b""
    async for piece in stream.aiter_bytes():
        *whole, left = (left + piece).split(b"\n")
        for line in whole:
            if line.strip():
                yield line.decode().strip("\r")
    if left.strip():
        yield left.decode()


OpenAIHTTPBackend._aiter_lines = lines


def main(directory: Path) -> None:
    """Run what appears in ``directory`` until the process is ended."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
    from guidellm.entrypoints import benchmark_generative_text
    from guidellm.schemas.benchmark import BenchmarkScenario

    first = multiprocessing.get_context("forkserver").Process(target=time.monotonic)
    first.start()  # the server that forks workers imports GuideLLM now, not under the first load
    first.join()
    (directory / "ready").touch()
    for number in count(1):
        scenario = directory / f"{number}.json"
        while not scenario.is_file():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        try:
            loaded = BenchmarkScenario.model_validate(json.loads(scenario.read_bytes()))
            asyncio.run(benchmark_generative_text(args=loaded, progress=False))
            loaded_to = Path(str(loaded.spec.outputs[0].path))
            loaded_to.rename(directory / f"{number}-report.json")
        except Exception as error:
            traceback.print_exc()
            said = " ".join(str(error).split()) or repr(error)
            written = directory / f"{number}-error.partial"
            written.write_text(said, encoding="utf-8")
            written.rename(directory / f"{number}-error.txt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
