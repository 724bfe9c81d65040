"""``quantkit recommend``: from the command line's options to a recommendation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError
from quantkit.ledger import LEDGER, Ledger
from quantkit.ledger.load import Slo
from quantkit.recommendation import Recommendation, Wants, profiles, recommend
from quantkit.system.sizes import parse_size


def run(
    directory: Path, *, max_memory: str | None, slo: str | None, **options: Any
) -> tuple[Ledger, Recommendation, list[Recommendation]]:
    """What a run's ledger speaks for, and for each profile; ``options``: other fields of
    ``Wants``."""
    try:
        memory = None if max_memory is None else parse_size(max_memory)
    except ValueError as error:
        raise RecipeError(f"--max-memory: {error}") from error
    ledger = Ledger.read(directory / LEDGER)
    objective = None if slo is None else Slo.parse(slo)
    wants = Wants(max_memory=memory, slo=objective, **options)
    return ledger, recommend(ledger, wants), profiles(ledger, wants)
