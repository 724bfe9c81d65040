"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(value: Any) -> int:
    """Bytes of ``8GiB``, ``500M`` (of 1000) or a number; raise ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if not found or not float(found[1]):
        raise ValueError(f"expected a size such as 8GiB or 500MB, not {value!r}")
    power = "KMGT".find(found[2].upper()) + 1
    return int(float(found[1]) * (1024**power if found[3] else 1000**power))


def gibibytes(size: int) -> str:
    """``1.50 GiB``."""
    return f"{size / 2**30:.2f} GiB"


Size = Annotated[int, BeforeValidator(parse_size)]
