"""A llama-server that fails when it starts, by the name of its model."""

from __future__ import annotations

from pathlib import Path

from quantkit.toolchains.llama_programs import find_llama_server

_PROGRAM = """#!/bin/bash
# "hangs" never answers; "taken" finds its port in use, and "starved" too little memory for its
# cache, when they start first.
first() {{ [ ! -e "$0.$1" ] && touch "$0.$1"; }}
case " $* " in
*" --alias hangs "*) exec sleep 600 ;;
*" --alias taken "*) if first taken; then set -- "$@" --port {port}; fi ;;
*" --alias starved "*) if first starved; then ulimit -v 800000; fi ;;
esac
export LD_LIBRARY_PATH="{libraries}"
exec "{server}" "$@"
"""
STARVED = {"context": 1 << 16, "slots": 8}
"""Of a backend whose cache does not fit when it is starved."""


def llama_server(directory: Path, taken_port: int) -> Path:
    """Write the program; somebody listens on ``taken_port``."""
    server = find_llama_server()
    path = directory / "llama-server"
    libraries = server.env.get("LD_LIBRARY_PATH", "")
    path.write_text(_PROGRAM.format(port=taken_port, libraries=libraries, server=server.path))
    path.chmod(0o755)
    return path
