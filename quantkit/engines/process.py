"""A server's process: start it, wait until it is ready, stop it for good."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from quantkit.engines.server import ServerCommand
from quantkit.errors import EngineError
from quantkit.system.memory import PeakMemory

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_SECONDS_TO_STOP = 25.0
"""Seconds: more than the supervisor needs to end a group that ignores SIGTERM."""
_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 3
_CHATTER = re.compile(r"^(\([^)]*pid=\d+\)\s*)?(INFO|WARNING|DEBUG)\b")
_LOG_PREFIX = re.compile(r"^\([^)]*pid=\d+\)\s*(ERROR \S+ \S+ \[[^\]]*\]\s*)?")
_EXCEPTION = re.compile(r"^[\w.]*(Error|Exception): ")
_COMPLAINT = re.compile(r"\berror\b|\bfailed\b", re.IGNORECASE)


@dataclass(frozen=True)
class Process:
    """A program that runs under a supervisor; see ``launched``."""

    name: str
    pid: int
    """The process id of the program itself."""
    log: Path
    started: float
    """``time.monotonic()`` when it was launched."""
    supervisor: subprocess.Popen[bytes]

    @property
    def exit_code(self) -> int | None:
        """128 + N for signal N; None while it runs."""
        return self.supervisor.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code, once it ends; raise EngineError where that takes too long."""
        try:
            return self.supervisor.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise self.error(f"has not ended after {timeout_s:.0f} s") from error

    def watch_memory(self) -> PeakMemory:
        """The peak of the summed resident memory of the program and all its children."""
        try:
            return PeakMemory(self.pid, children=True)
        except psutil.NoSuchProcess as error:
            raise self.error(f"ended at once with exit code {self.wait()}") from error

    def wait_ready(self, host: str, port: int, command: ServerCommand) -> float:
        """Seconds from the launch until ``ready_path`` answers 200.

        Raise EngineError with the server's last lines where it ends first or takes too long.
        """
        while True:
            if self.exit_code is not None:
                raise self.error(f"ended with exit code {self.exit_code} before it was ready")
            if _answers(host, port, command.ready_path):
                return time.monotonic() - self.started
            if time.monotonic() - self.started > command.start_timeout_s:
                raise self.error(f"was not ready after {command.start_timeout_s:.0f} s")
            time.sleep(0.1)

    def error(self, what: str) -> EngineError:
        """An EngineError in one line: what happened, the last lines of the log, where it is."""
        return EngineError(f"{self.name} {what}: {last_words(self.log)}; see {self.log}")


@dataclass(frozen=True)
class RunningServer:
    """A server that answers, and where."""

    process: Process
    host: str
    port: int
    api_key: str
    model_name: str


@contextlib.contextmanager
def launched(
    name: str, argv: Sequence[str], env: Mapping[str, str], log: Path
) -> Iterator[Process]:
    """Run a program while the block runs: nothing of it is left when the block ends in any way.

    Its output goes to ``log``. Raise EngineError where it cannot start.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(_emptied(log))
        supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SUPERVISOR), *argv],
            env=os.environ | dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,
        )
        stack.callback(_stop, supervisor)
        assert supervisor.stdout is not None
        pid = supervisor.stdout.readline().strip()
        if not pid:
            raise EngineError(f"{name} could not be started ({argv[0]}): {last_words(log)}")
        yield Process(name, int(pid), log, started, supervisor)


def _emptied(log: Path) -> BinaryIO:
    """Opened to append, so that emptying the file later leaves no hole at its beginning."""
    log.open("wb").close()
    return log.open("ab")


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nothing listens at this moment."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        port: int = listener.getsockname()[1]
        return port


def check_port(host: str, port: int) -> None:
    """Raise EngineError where a server could not listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        # As servers do: a port whose last connections are only waiting to be forgotten is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise EngineError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port"
            ) from error


def last_words(log: Path) -> str:
    """What a log says about its end, in one line: its first and last exceptions where it has
    some, else its first and last complaints, else its last lines."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if not _CHATTER.match(line)]
    lines = [line for line in (_LOG_PREFIX.sub("", line).strip() for line in lines) if line]
    exceptions = list(dict.fromkeys(line for line in lines if _EXCEPTION.match(line)))
    complaints = list(dict.fromkeys(line for line in lines if _COMPLAINT.search(line)))
    if exceptions:
        chosen = [exceptions[0], *exceptions[1:][-1:]]
    elif complaints:
        chosen = [complaints[0], *complaints[1:][-_TAIL_LINES + 1 :]]
    else:
        chosen = lines[-_TAIL_LINES:]
    return " | ".join(line[:300] for line in chosen) or "it said nothing"


def _stop(supervisor: subprocess.Popen[bytes]) -> None:
    """Close the pipe that keeps the group alive, and wait until it is gone."""
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    supervisor.stdin.close()
    supervisor.stdout.close()
    supervisor.wait(_SECONDS_TO_STOP)


def _answers(host: str, port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
