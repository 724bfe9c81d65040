"""The load generator: GuideLLM in a process of its own, offline, which takes one load at a time."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from quantkit.bench import guidellm
from quantkit.bench.closed_loop import closed_loop
from quantkit.bench.energy import Meter
from quantkit.bench.guidellm import Target
from quantkit.bench.loads import Closed, Load, Times, Workload
from quantkit.bench.open_loop import open_loop
from quantkit.bench.watch import BOUND, Use, Watch
from quantkit.engines.process import Process, launched
from quantkit.errors import EngineError
from quantkit.ledger.load import Reading, Slo
from quantkit.progress import say

_CLIENT = Path(__file__).with_name("client.py")
_SECONDS_BESIDES = 90.0
"""For GuideLLM's own start and end, on a slow machine, and the warm-up's first request."""
_ATTEMPTS = 2
"""GuideLLM was seen to wait for its worker for ever at the end of a load, twice in fifty runs; and
somebody may kill it."""
_ENDS = ("report.json", "error.txt")
_LATE_S = 0.1
"""An open loop whose requests are sent so much too late, 5 % of them, is not the one asked for."""


class LoadGenerator:
    """Puts loads on ``target``, one after the other; files go into ``directory``, emptied first.

    ``check``: called while a load is on; what it raises ends the load.
    """

    def __init__(
        self,
        target: Target,
        workload: Workload,
        directory: Path,
        *,
        slo: Slo | None = None,
        meter: Meter | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._target = target
        self._workload = workload
        self._directory = directory
        self._slo = slo
        self._meter = meter
        self._check = check
        self._stack = ExitStack()
        self._number = 0
        """Of the process's last load."""
        self._loads = 0

    def __enter__(self) -> LoadGenerator:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def measure(self, load: Load, times: Times) -> Reading:
        """One repetition of one load, with prompts that no load before it had.

        Raise EngineError where GuideLLM fails, or where no request was completed.
        """
        where = f"bench at {load}"
        if not isinstance(load, Closed):
            times = times.open_loop(self._slo, self._workload.output_tokens)
        benchmark, watched = self._run(load, times, where)
        if isinstance(load, Closed):
            reading = closed_loop(benchmark, self._workload, times, self._slo, where)
            late_s = 0.0
        else:
            reading, late_s = open_loop(benchmark, self._workload, times, self._slo, where)
        start = benchmark["scheduler_metrics"]["start_time"] + times.warmup
        use = watched.use(start, start + times.window)
        return _with(reading, use, late_s)

    def _run(self, load: Load, times: Times, where: str) -> tuple[dict[str, Any], Watch]:
        limit = times.total + _SECONDS_BESIDES
        for _ in range(_ATTEMPTS):
            self._number += 1
            self._loads += 1
            stem = self._directory / str(self._number)
            scenario = guidellm.scenario(
                self._target, self._workload, load, times, self._loads, stem
            )
            partial = stem.with_suffix(".partial")
            partial.write_text(json.dumps(scenario, indent=2), encoding="utf-8")
            with Watch(self._process.pid, self._meter) as watch:
                partial.rename(stem.with_suffix(".json"))
                report = self._await(stem, limit)
            if report is not None:
                return report["benchmarks"][0], watch
            code = self._process.exit_code
            what = "stands still" if code is None else f"ended with exit code {code}"
            error = self._process.error(f"{what} ({where})")
            say(f"{error}; it is started again")
            self._stack.close()
            self._start()
        raise error

    def _await(self, stem: Path, limit: float) -> dict[str, Any] | None:
        """The report, None where GuideLLM ended without one or takes too long."""
        report, failed = (stem.with_name(f"{stem.name}-{end}") for end in _ENDS)
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline and self._process.exit_code is None:
            self._check()
            if report.is_file():
                found: dict[str, Any] = json.loads(report.read_bytes())
                return found
            if failed.is_file():
                raise EngineError(f"guidellm: {failed.read_text()}; see {self._process.log}")
            time.sleep(0.05)
        return None

    def _start(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        self._number = 0
        # -P: the directory of the script, where a guidellm.py lies, is no place to import from.
        argv = [sys.executable, "-P", str(_CLIENT), str(self._directory)]
        env = {
            **guidellm.ENVIRONMENT,
            "GUIDELLM__SPEC__BACKEND__API_KEY": self._target.api_key,
            "HF_DATASETS_CACHE": str(self._directory / "cache"),
        }
        log = self._directory.with_name(f"{self._directory.name}.log")
        self._process: Process = self._stack.enter_context(launched("guidellm", argv, env, log))


def _with(reading: Reading, use: Use | None, late_s: float) -> Reading:
    bound = late_s > _LATE_S or (use is not None and use.busy > BOUND)
    found = {"client_cpu": use.cpu, "client_busy": use.busy, "joules": use.joules} if use else {}
    return reading.model_copy(update={**found, "client_bound": bound})
