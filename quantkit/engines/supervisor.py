"""Run one program in its own process group, and end the whole group when this one's stdin closes.

Run as a script with the program and its arguments; uses the standard library only, so that it
costs little. stdin is a pipe that the owner holds and never writes to: however the owner ends,
SIGKILL included, the pipe closes and nothing of the program is left. The program's pid is written
to stdout; its own output goes to stderr. The exit code is the program's, 128 + N for signal N.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

_SECONDS_TO_END = 10.0
_SECONDS_FOR_THE_REST = 2.0
"""Seconds for what a program leaves running when it ends by itself."""
_PR_SET_CHILD_SUBREAPER = 36
_RESET = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


def main(argv: list[str]) -> int:
    """Supervise ``argv`` to its end."""
    if sys.platform == "linux":
        # Orphans of the program become our children: then waitpid tells when none is left.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    program = os.posix_spawnp(
        argv[0],
        argv,
        os.environ,
        setpgroup=0,
        setsigdef=_RESET,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, 2, 1),
        ],
    )
    os.write(1, f"{program}\n".encode())
    os.close(1)
    ended: dict[int, int] = {}
    asked_to_end = False
    while program not in ended and not asked_to_end:
        asked_to_end = bool(select.select([0], [], [], 0.1)[0])
        _reap(ended)
    grace = _SECONDS_TO_END if asked_to_end else _SECONDS_FOR_THE_REST
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, _SECONDS_TO_END)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program, number)
        deadline = time.monotonic() + seconds
        while _reap(ended) and time.monotonic() < deadline:
            time.sleep(0.02)
    code = ended.get(program, -signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _reap(ended: dict[int, int]) -> bool:
    """Collect the exit codes of children that ended; whether any is still running."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        ended[pid] = os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
