"""Numbers as a reader wants them: as many digits as they are worth, with their unit."""

from __future__ import annotations

import math
from collections.abc import Callable

from quantkit.recommendation.interval import Interval

NOTHING = "\N{EN DASH}"
"""What stands where there is no number."""
NOT_FINITE = "not finite"


def number(value: float | None, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits; an exponent only below 1e-4."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(power)  # after rounding: 0.9999 counts as 1
    if exponent < -4:
        return _minus(f"{mantissa}e{exponent}")
    return fixed(value, max(0, digits - 1 - exponent))


def fixed(value: float, decimals: int) -> str:
    """``value`` with ``decimals`` places and groups of thousands."""
    return _minus(f"{value:,.{decimals}f}") if math.isfinite(value) else NOT_FINITE


def signed(value: float, decimals: int) -> str:
    """Like ``fixed``, with the sign always; what rounds to zero has none."""
    text = fixed(value, decimals)
    if not math.isfinite(value) or not any(digit in text for digit in "123456789"):
        return text.lstrip("\N{MINUS SIGN}")
    return text if value < 0 else f"+{text}"


def plus_minus(value: float, stderr: float | None) -> tuple[str, str]:
    """Value and ``± error``, both to the place of the error's second significant digit.

    The second is empty where there is no error to state.
    """
    if stderr is None or not math.isfinite(stderr) or not math.isfinite(value) or stderr <= 0:
        return number(value), ""
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    if decimals > 7:
        return number(value), f"± {number(stderr, 2)}"
    return fixed(value, decimals), f"± {fixed(stderr, decimals)}"


def span(interval: Interval, say: Callable[[float], str] = number) -> str:
    """``118 (111 to 125)``; ``2.5 (2.5 or more)``; the value alone where it has no error."""
    if interval.low == interval.high:
        return say(interval.value)
    if math.isinf(interval.high):
        return f"{say(interval.value)} or more"
    return f"{say(interval.value)} ({say(interval.low)} to {say(interval.high)})"


def size(count: int | None) -> str:
    """Bytes in decimal units, as the hub shows them: ``92.1 MB``."""
    if count is None:
        return NOTHING
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{number(value)} {unit}"
        value /= 1000
    return f"{number(value)} TB"


def count(value: int) -> str:
    """A large count in words of its magnitude: ``135 M``, ``7.24 B``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{number(value / limit)} {unit}"
    return str(value)


def duration(seconds: float) -> str:
    """``48 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if not math.isfinite(seconds):
        return NOT_FINITE
    whole = round(seconds)
    if whole < 60:
        return f"{number(seconds, 2)} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def milliseconds(value: float) -> str:
    """``38 ms``, ``1.42 s``."""
    return f"{number(value / 1000)} s" if value >= 1000 else f"{number(value, 2)} ms"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
