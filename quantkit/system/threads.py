"""How threads wait for one another on a machine that they do not have for themselves."""

from __future__ import annotations

import os

_SPINS = "1000"


def spin_briefly() -> None:
    """Let libgomp's threads spin at a barrier for a moment only; before torch is imported.

    By its default, 300 000 rounds, every barrier lasts a time slice as soon as anything else wants
    a core: scoring eight windows of SmolLM2-135M took 109 s beside one busy process on two cores,
    and 21 s with this; on idle cores there is no difference. Servers and load generators inherit
    it. What the user set is left alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
