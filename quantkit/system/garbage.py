"""Python's garbage collector, switched off where it would find nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keeping_all() -> Iterator[None]:
    """Do not look for garbage while modules are imported and vocabularies are read.

    They are hundreds of thousands of objects that stay, and going through them again and again is
    a quarter of the time that planning a conversion takes. What is there at the end is never gone
    through again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
