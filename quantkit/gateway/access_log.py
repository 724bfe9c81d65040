"""What a gateway says while it runs: one JSON object a line on stderr, and never a prompt."""

from __future__ import annotations

import contextlib
import json
import os
from datetime import UTC, datetime
from typing import Any

_STDERR = 2


def event(what: str, **facts: Any) -> None:
    """Write one line; facts that are None are left out."""
    moment = datetime.now(UTC).isoformat(timespec="milliseconds")
    known = {key: value for key, value in facts.items() if value is not None}
    say(json.dumps({"time": moment, "event": what, **known}, default=str))


def say(line: str) -> None:
    """Write one line for a person.

    A full disk or a closed pipe must not end requests: what cannot be written is lost.
    """
    with contextlib.suppress(OSError):
        os.write(_STDERR, f"{line}\n".encode())
