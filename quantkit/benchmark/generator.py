"""The load generator: GuideLLM in a process of its own, offline, which takes one load at a time."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from quantkit.benchmark import guidellm
from quantkit.benchmark.closed_loop import closed_loop
from quantkit.benchmark.energy import Meter
from quantkit.benchmark.guidellm import Target
from quantkit.benchmark.loads import Closed, Load, Times, Workload
from quantkit.benchmark.open_loop import open_loop
from quantkit.benchmark.watch import BOUND, Use, Watch
from quantkit.engines.process import Process, launched
from quantkit.errors import EngineError
from quantkit.ledger.load import Reading, Slo
from quantkit.system.progress import say

_SCRIPT = Path(__file__).with_name("client.py")
_SECONDS_BESIDES = 180.0
"""Seconds for GuideLLM's own start and end on a slow machine, and for the first warm-up request."""
_ATTEMPTS = 2
"""How often a load is tried: twice in fifty runs GuideLLM waited for its worker for ever at the
end of a load, and somebody may kill it."""
_READY = "ready"
_ENDS = ("report.json", "error.txt")
_LATE_S = 0.1
"""Seconds. An open loop that sends 5 % of its requests later than this is not the load that was
asked for."""


class Client:
    """GuideLLM's process, for any number of servers: importing it takes seconds.

    Started when it is first needed, and again where it ended; it ends with the block. Files go into
    ``directory``, emptied then. ``key``: the API key that it sends, to every server.
    """

    def __init__(self, directory: Path) -> None:
        self.key = secrets.token_hex(16)
        self.directory = directory
        self._stack = ExitStack()
        self._process: Process | None = None
        self._number = 0
        """The number of the process's last load."""

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def start(self) -> None:
        """Start it, unless it runs; it may need some seconds until it is ``ready``."""
        if self._process is None or self._process.exit_code is not None:
            self._stack.close()
            self._process = self._start()

    def wait_ready(self) -> None:
        """Wait until it can start a load at once; if that never happens, the load itself reports
        it."""
        self.start()
        assert self._process is not None
        deadline = time.monotonic() + _SECONDS_BESIDES
        ready = self.directory / _READY
        while not ready.is_file() and time.monotonic() < deadline and not self._process.exit_code:
            time.sleep(0.05)

    def run(
        self,
        scenario: Callable[[Path], dict[str, Any]],
        limit: float,
        meter: Meter | None,
        check: Callable[[], None],
        where: str,
    ) -> tuple[dict[str, Any], Watch]:
        """GuideLLM's report on a scenario, and what was watched meanwhile. The scenario is given
        the beginning of the names of the files that it may use.

        ``limit``: seconds; ``check`` is called again and again, what it raises ends the load. Raise
        EngineError where GuideLLM fails.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            self.start()
            assert self._process is not None
            process = self._process
            self._number += 1
            stem = self.directory / str(self._number)
            partial = stem.with_suffix(".partial")
            partial.write_text(json.dumps(scenario(stem), indent=2), encoding="utf-8")
            with Watch(process.pid, meter) as watch:
                partial.rename(stem.with_suffix(".json"))
                report = self._await(process, stem, limit, check)
            if report is not None:
                return report, watch
            code = process.exit_code
            what = "stands still" if code is None else f"ended with exit code {code}"
            error = process.error(f"{what} ({where})")
            if attempt < _ATTEMPTS:
                say(f"{error}; it is started again")
            self._stack.close()
            self._process = None
        raise error

    def _await(
        self, process: Process, stem: Path, limit: float, check: Callable[[], None]
    ) -> dict[str, Any] | None:
        """The report, None where GuideLLM ended without one or takes too long."""
        report, failed = (stem.with_name(f"{stem.name}-{end}") for end in _ENDS)
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline and process.exit_code is None:
            check()
            if report.is_file():
                found: dict[str, Any] = json.loads(report.read_bytes())
                return found
            if failed.is_file():
                raise EngineError(f"guidellm: {failed.read_text()}; see {process.log}")
            time.sleep(0.05)
        return None

    def _start(self) -> Process:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        self._number = 0
        # -P: the directory of the script, where a guidellm.py lies, is no place to import from.
        argv = [sys.executable, "-P", str(_SCRIPT), str(self.directory)]
        env = {
            **guidellm.ENVIRONMENT,
            "GUIDELLM__SPEC__BACKEND__API_KEY": self.key,
            "HF_DATASETS_CACHE": str(self.directory / "cache"),
        }
        log = self.directory.with_name(f"{self.directory.name}.log")
        return self._stack.enter_context(launched("guidellm", argv, env, log))


@dataclass
class LoadGenerator:
    """Puts loads on ``target`` through ``client``, one after the other.

    ``check``: called while a load is on; what it raises ends the load.
    """

    client: Client
    target: Target
    workload: Workload
    slo: Slo | None = None
    meter: Meter | None = None
    check: Callable[[], None] = lambda: None
    _loads: int = 0

    def measure(self, load: Load, times: Times) -> Reading:
        """One repetition of one load, with prompts that no load of this target had before.

        Raise EngineError where GuideLLM fails, or where no request was completed.
        """
        where = f"bench at {load}"
        if not isinstance(load, Closed):
            times = times.open_loop(self.slo, self.workload.output_tokens)
        benchmark, watched = self._run(load, times, where)
        if isinstance(load, Closed):
            reading = closed_loop(benchmark, self.workload, times, self.slo, where)
            late_s = 0.0
        else:
            reading, late_s = open_loop(benchmark, self.workload, times, self.slo, where)
        start = benchmark["scheduler_metrics"]["start_time"] + times.warmup
        use = watched.use(start, start + times.window)
        return _with(reading, use, late_s)

    def _run(self, load: Load, times: Times, where: str) -> tuple[dict[str, Any], Watch]:
        def scenario(stem: Path) -> dict[str, Any]:
            self._loads += 1
            return guidellm.scenario(self.target, self.workload, load, times, self._loads, stem)

        limit = times.total + _SECONDS_BESIDES
        report, watch = self.client.run(scenario, limit, self.meter, self.check, where)
        return report["benchmarks"][0], watch


def _with(reading: Reading, use: Use | None, late_s: float) -> Reading:
    bound = late_s > _LATE_S or (use is not None and use.busy > BOUND)
    found = {"client_cpu": use.cpu, "client_busy": use.busy, "joules": use.joules} if use else {}
    return reading.model_copy(update={**found, "client_bound": bound})
