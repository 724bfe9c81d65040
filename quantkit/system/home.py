"""Where quantkit keeps what outlives a command: toolchains, unpacked demo sources."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """``$QUANTKIT_HOME``, else ``$XDG_CACHE_HOME/quantkit``, else ``~/.cache/quantkit``."""
    chosen = os.environ.get("QUANTKIT_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "quantkit"
