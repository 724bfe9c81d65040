from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from quantkit.engines.process import check_port, free_port, last_words, launched
from quantkit.engines.server import ServerCommand, start_timeout
from quantkit.errors import EngineError

SERVER = textwrap.dedent(
    """
    import http.server, os, signal, subprocess, sys
    marker, port, stubborn = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "stubborn"
    code = "import signal, time; " + (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if stubborn else "")
    child = subprocess.Popen([sys.executable, "-c", code + "time.sleep(600)", marker])
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
    """
)


def alive(marker: str) -> list[psutil.Process]:
    """Processes that carry the marker in their arguments, other than pytest itself."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if marker in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_until_gone(marker: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while alive(marker):
        assert time.monotonic() < deadline, f"still running: {alive(marker)}"
        time.sleep(0.05)


@pytest.fixture
def marker(request: pytest.FixtureRequest) -> str:
    return f"marker-{os.getpid()}-{request.node.name}"


def server_argv(tmp_path: Path, marker: str, port: int, temper: str = "meek") -> list[str]:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    return [sys.executable, str(script), marker, str(port), temper]


def test_ready_and_gone_with_children(tmp_path: Path, marker: str) -> None:
    port = free_port()
    argv = server_argv(tmp_path, marker, port)
    with launched("toy", argv, {}, tmp_path / "log") as server:
        seconds = server.wait_ready("127.0.0.1", port, ServerCommand(tuple(argv)))
        assert 0 < seconds < 30
        assert psutil.Process(server.pid).cmdline()[1:] == argv[1:]
        assert len(alive(marker)) >= 2  # the server, its child, and the supervisor's arguments
    assert alive(marker) == []


def test_children_that_ignore_sigterm_are_killed(
    tmp_path: Path, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = tmp_path / "supervisor.py"
    source = Path(sys.modules["quantkit.engines.process"].__file__ or "").with_name("supervisor.py")
    quick.write_text(source.read_text().replace("_SECONDS_TO_END = 10.0", "_SECONDS_TO_END = 1.0"))
    monkeypatch.setattr("quantkit.engines.process._SUPERVISOR", quick)
    port = free_port()
    argv = server_argv(tmp_path, marker, port, "stubborn")
    with launched("toy", argv, {}, tmp_path / "log") as server:
        server.wait_ready("127.0.0.1", port, ServerCommand(tuple(argv)))
    assert alive(marker) == []


def test_exception_in_the_block_stops_the_server(tmp_path: Path, marker: str) -> None:
    argv = server_argv(tmp_path, marker, free_port())
    with pytest.raises(KeyboardInterrupt), launched("toy", argv, {}, tmp_path / "log"):
        raise KeyboardInterrupt
    assert alive(marker) == []


def test_owner_killed_leaves_nothing(tmp_path: Path, marker: str) -> None:
    port = free_port()
    argv = server_argv(tmp_path, marker, port)
    owner = tmp_path / "owner.py"
    owner.write_text(
        "from pathlib import Path\n"
        "from quantkit.engines.server import ServerCommand\n"
        "from quantkit.engines.process import launched\n"
        f"argv = {argv!r}\n"
        f"with launched('toy', argv, {{}}, Path({str(tmp_path / 'log')!r})) as server:\n"
        f"    server.wait_ready('127.0.0.1', {port}, ServerCommand(tuple(argv)))\n"
        "    print('ready', flush=True)\n"
        "    server.wait()\n"
    )
    with subprocess.Popen([sys.executable, str(owner)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert len(alive(marker)) >= 2
        process.send_signal(signal.SIGKILL)
    wait_until_gone(marker, 15)


def test_early_exit_is_noticed_at_once_with_its_reason(tmp_path: Path) -> None:
    code = "import sys; print('loading'); print('ValueError: bad weights'); sys.exit(3)"
    command = ServerCommand((sys.executable, "-c", code))
    with (
        pytest.raises(EngineError) as caught,
        launched("toy", command.argv, {}, tmp_path / "log") as server,
    ):
        server.wait_ready("127.0.0.1", free_port(), command)
    message = str(caught.value)
    assert "exit code 3" in message
    assert "ValueError: bad weights" in message
    assert str(tmp_path / "log") in message
    assert "\n" not in message


def test_a_crash_is_told_by_its_signal(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    with launched("toy", [sys.executable, "-c", code], {}, tmp_path / "log") as server:
        assert server.wait(20) == 128 + signal.SIGSEGV


def test_what_a_server_leaves_when_it_dies_is_stopped(tmp_path: Path, marker: str) -> None:
    code = (
        "import subprocess, sys; "
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', {marker!r}])"
    )
    with launched("toy", [sys.executable, "-c", code], {}, tmp_path / "log") as server:
        assert server.wait(20) == 0
        assert alive(marker) == []


def test_not_ready_in_time(tmp_path: Path) -> None:
    code = "import time; print('still loading', flush=True); time.sleep(600)"
    command = ServerCommand((sys.executable, "-c", code), start_timeout_s=1)
    with (
        pytest.raises(EngineError, match=r"was not ready after 1 s: still loading; see "),
        launched("toy", command.argv, {}, tmp_path / "log") as server,
    ):
        server.wait_ready("127.0.0.1", free_port(), command)


def test_large_weights_are_given_time() -> None:
    """140 GB, at the 100 MB/s of a network's disk, take 23 minutes."""
    assert start_timeout(0) == 300
    assert start_timeout(140 * 10**9) > 300 + 1400


def test_program_that_does_not_exist(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match="could not be started"),
        launched("toy", [str(tmp_path / "nothing")], {}, tmp_path / "log"),
    ):
        pass


def test_environment_reaches_the_program(tmp_path: Path) -> None:
    code = "import os; print(os.environ['QUANTKIT_TEST_KEY'])"
    log = tmp_path / "log"
    with launched("toy", [sys.executable, "-c", code], {"QUANTKIT_TEST_KEY": "s3cret"}, log) as toy:
        assert toy.wait(20) == 0
        assert "s3cret" not in " ".join(toy.supervisor.args)  # type: ignore[arg-type]
    assert log.read_text() == "s3cret\n"


def test_memory_of_the_whole_tree(tmp_path: Path) -> None:
    """Parent and child hold 64 MiB each: the peak is of both, well above either."""
    hold = "held = bytearray(64 << 20); import sys, time"
    code = (
        f"{hold}; import subprocess; "
        f"subprocess.run([sys.executable, '-c', {hold + '; time.sleep(1)'!r}])"
    )
    with (
        launched("toy", [sys.executable, "-c", code], {}, tmp_path / "log") as toy,
        toy.watch_memory() as memory,
    ):
        assert toy.wait(30) == 0
    assert 128 << 20 < memory.peak_bytes < 220 << 20


def test_port_in_use() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(EngineError, match=rf"127\.0\.0\.1:{port}: Address already in use"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", free_port())


def test_last_words_are_the_root_cause_and_the_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "(EngineCore pid=7) INFO 11-23 18:47:53 [core.py:133] Initializing\n"
        "(EngineCore pid=7) WARNING 11-23 18:47:53 [a.py:1] This can cause errors like OSError: x\n"
        "(EngineCore pid=7) ERROR 11-23 18:47:54 [core.py:9] ValueError: group_size 48 is odd\n"
        '(APIServer pid=1)   File "x.py", line 3\n'
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert last_words(log) == (
        "ValueError: group_size 48 is odd | "
        "RuntimeError: Engine core initialization failed. See root cause above."
    )
    log.write_text(
        "alloc: failed to allocate 9 bytes\ngraph: failed\nstill here\ncontext: failed to be made\n"
        "model: failed to load\nexiting due to an error\n"
    )
    assert last_words(log) == (
        "alloc: failed to allocate 9 bytes | model: failed to load | exiting due to an error"
    )
    log.write_text("one\n\ntwo\nthree\nfour\n")
    assert last_words(log) == "two | three | four"
    log.write_text("")
    assert last_words(log) == "it said nothing"
