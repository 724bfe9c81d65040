"""Where each variant's loss comes from: a stacked bar a variant, and the numbers below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.ledger import Ledger, Row
from quantkit.ledger.loss import Loss, NoiseFloor, Part
from quantkit.reports import texts
from quantkit.reports.format import NOTHING, fixed, number, plus_minus, signed
from quantkit.reports.noise import Z95, AgainstFloor, against_floor
from quantkit.reports.panels import Measure, Panels, Reading, lay_out
from quantkit.reports.scales import around, logarithmic

PARTS = ("conversion", "quantization", "activations", "engine")
Number = tuple[str, str]
"""A value and its error: ``+0.0033``, ``± 0.0014``."""
_FLOOR = "noise floor"


@dataclass(frozen=True)
class Line:
    """One variant, or the source on another engine; every number with its error."""

    id: str
    is_floor: bool
    engine: str
    parts: tuple[Number, ...]
    """As ``Losses.parts``."""
    total: Number
    ppl: str
    """The total as a change of the perplexity."""
    kld_quantization: Number
    kld: Number
    against_floor: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Losses:
    """The section: its chart and its table."""

    windows: str
    text: str
    """The first of several; else empty."""
    parts: tuple[str, ...]
    """Of ``PARTS``; activations only where some are rounded."""
    chart: Panels | None
    lines: tuple[Line, ...]


def losses(ledger: Ledger) -> Losses | None:
    """None where no loss was split."""
    split = [(row, row.loss) for row in ledger.variants if row.loss]
    if not split:
        return None
    rounded = any(loss.activations for _, loss in split)
    parts = tuple(name for name in PARTS if rounded or name != "activations")
    return Losses(
        " or ".join(dict.fromkeys(f"{loss.windows:,}" for _, loss in split)),
        texts.title(ledger, ledger.texts[0].name) if texts.several(ledger) else "",
        parts,
        _chart(ledger.noise_floor, split, parts),
        (
            *(_floor_line(floor, parts) for floor in ledger.noise_floor),
            *(_line(row.id, loss, parts, against_floor(ledger, row)) for row, loss in split),
        ),
    )


def _line(id_: str, loss: Loss, parts: Sequence[str], floor: AgainstFloor | None) -> Line:
    return Line(
        id_,
        False,
        str(loss.serving_engine or f"{loss.reference_engine} only"),
        tuple(_signed(getattr(loss, name)) for name in parts),
        _signed(loss.total),
        _percent(loss.total),
        _plain(loss.kld_quantization),
        _plain(loss.kld),
        _against(floor),
        tuple(loss.notes),
    )


def _floor_line(floor: NoiseFloor, parts: Sequence[str]) -> Line:
    top = floor.top1_agreement
    return Line(
        f"{_FLOOR}: {floor.weights if floor.batch == 1 else _batch(floor)}",
        True,
        str(floor.engine),
        (_signed(None),) * len(parts),
        _signed(floor.nll),
        _percent(floor.nll),
        _plain(None),
        _plain(floor.kld),
        "" if top is None else f"same top token at {fixed(100 * top.value, 1)} %",
        (),
    )


def _batch(floor: NoiseFloor) -> str:
    return f"batch × {floor.batch}"


def _floor_name(floor: NoiseFloor) -> str:
    """The label, short enough for the chart."""
    return _FLOOR if floor.batch == 1 else f"noise, {_batch(floor)}"


def _against(found: AgainstFloor | None) -> str:
    """``KLD 55 × the floor``, or what is below it."""
    if found is None:
        return NOTHING
    if found.below:
        return f"below the noise floor: {' and '.join(found.below)}"
    name, ratio = ("KLD", found.kld) if found.kld is not None else ("loss", found.loss)
    if math.isinf(ratio):
        return f"{name} above the floor, which is 0"
    return f"{name} {number(ratio, 2)} × the floor"


def _signed(part: Part | None) -> Number:
    value, error = _plain(part)
    return f"+{value}" if part is not None and part.value > 0 else value, error


def _plain(part: Part | None) -> Number:
    return (NOTHING, "") if part is None else plus_minus(part.value, part.stderr)


def _percent(part: Part) -> str:
    return f"{signed(100 * math.expm1(part.value), 2)} %"


def _chart(
    floors: list[NoiseFloor], split: list[tuple[Row, Loss]], parts: Sequence[str]
) -> Panels | None:
    names = [(_floor_name(floor), str(floor.engine)) for floor in floors]
    names += [(row.id, str(loss.serving_engine or loss.reference_engine)) for row, loss in split]
    return lay_out(
        names,
        [
            Measure(
                "Loss",
                ("nats per token: the logarithm of the ratio of perplexities", "← better"),
                [
                    *([_total(_floor_name(floor), floor.nll)] for floor in floors),
                    *([*_stack(row.id, loss), _total(row.id, loss.total)] for row, loss in split),
                ],
                around,
                share=2.2,
                line_at=0.0,
            ),
            Measure(
                "KL divergence",
                ("nats per token, log scale", "← nearer"),
                [
                    *(_divergence(_floor_name(floor), floor.kld, None) for floor in floors),
                    *(_divergence(row.id, loss.kld, loss.kld_quantization) for row, loss in split),
                ],
                logarithmic,
            ),
        ],
        row_height=36.0,
        key=[
            *((name, 0, name) for name in parts),
            ("total", 0, "total, with its 95 % interval"),
            ("median", 0, "divergence by quantization alone"),
            ("mean", 0, "divergence on the serving engine"),
        ],
        summary="The loss of each variant in nats per token, as a stack of "
        f"{', '.join(parts)}, and its divergence; the noise floor is the unquantized source "
        "on the same engines, and in larger batches. "
        "The table has the same numbers.",
    )


def _stack(id_: str, loss: Loss) -> list[Reading]:
    """The parts end to end: losses to the right of zero, gains to the left of it."""
    ends = {True: 0.0, False: 0.0}
    readings = []
    for name in PARTS:
        part: Part | None = getattr(loss, name)
        if part is None:
            continue
        start = ends[part.value > 0]
        end = ends[part.value > 0] = start + part.value
        words = f"{id_}\n{name} {_words(part)}"
        readings.append(Reading(name, end, words, (min(start, end), max(start, end))))
    return readings


def _total(id_: str, part: Part) -> Reading:
    words = f"{id_}\ntotal {_words(part)}, perplexity {_percent(part)}"
    return Reading("total", part.value, words, _interval(part), capped=True)


def _divergence(id_: str, served: Part | None, own: Part | None) -> list[Reading]:
    found = [("median", "of its weights alone", own), ("mean", "on the serving engine", served)]
    return [
        Reading(kind, one.value, f"{id_}\nKLD {what} {_words(one)}")
        for kind, what, one in found
        if one is not None and one.value > 0
    ]


def _words(part: Part) -> str:
    return " ".join(filter(None, (*_plain(part), "nats")))


def _interval(part: Part) -> tuple[float, float]:
    half = Z95 * (part.stderr or 0.0)
    return part.value - half, part.value + half
