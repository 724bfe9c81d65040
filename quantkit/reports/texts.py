"""The texts of a run, as the report speaks of them."""

from __future__ import annotations

import re

from quantkit.ledger import Ledger


def names(ledger: Ledger) -> list[str]:
    """In the order of the recipe."""
    return [text.name for text in ledger.texts]


def several(ledger: Ledger) -> bool:
    """Whether a drift must name its text."""
    return len(ledger.texts) > 1


def calibration_shares(ledger: Ledger) -> dict[str, float]:
    """The texts that are of a dataset of the calibration's, other parts of one kind, and how much
    of the calibration that is."""
    calibration = ledger.calibration
    if calibration is None:
        return {}
    kinds = [(kind.dataset, kind.samples) for kind in calibration.kinds]
    of = kinds or [(calibration.dataset, calibration.samples)]
    found = {}
    for text in ledger.texts:
        own = _dataset(text.dataset)
        alike = sum(samples for dataset, samples in of if _dataset(dataset) == own)
        if alike:
            found[text.name] = alike / calibration.samples
    return found


def title(ledger: Ledger, text: str) -> str:
    """The name, and whether it is of the calibration's kind."""
    share = calibration_shares(ledger).get(text)
    return text if share is None else f"{text}, {alike(share)}"


def alike(share: float) -> str:
    """``like 19 % of the calibration``."""
    return "like the calibration" if share == 1 else f"like {100 * share:.0f} % of the calibration"


def on(ledger: Ledger, text: str) -> str:
    """`` on stdlib:code``, to stand after a measure; nothing where there is but one text."""
    return f" on {title(ledger, text)}" if several(ledger) else ""


def _dataset(described: str) -> str:
    """``pydoc`` of ``pydoc:evaluation``; ``Salesforce/wikitext`` of one of its parts."""
    return re.split(r"[\s:]", described)[0]
