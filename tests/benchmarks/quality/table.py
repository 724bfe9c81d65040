"""Records as Markdown: each method against the rounding that has the same grid, text by text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, stdev

from tests.benchmarks.quality.methods import METHODS
from tests.benchmarks.quality.oracle import Scores
from tests.benchmarks.quality.records import Record

HEAD = (
    "method", "scheme", "by", "bits: all / linears", "KLD", "÷ rounding: mean", "worst text",
    "top-1", "ppl ÷ reference: mean", "worst text", "seconds",
)  # fmt: skip


def tables(records: list[Record]) -> Iterator[str]:
    """For each model and calibration the table, and KLD by text."""
    groups = dict.fromkeys((r.model, r.scored, r.calibration) for r in records if r.calibration)
    groups = groups or dict.fromkeys((r.model, r.scored, "") for r in records)
    order = list(METHODS)
    for model, scored, calibration in groups:
        rows = [
            record
            for record in records
            if (record.model, record.scored) == (model, scored)
            and record.calibration in ("", calibration)
        ]
        rows.sort(key=lambda r: (*_scheme(r), order.index(r.method)))
        yield f"**{model}**, calibrated on {calibration}; scored: {scored}\n"
        yield _line(HEAD) + _line(["---"] * len(HEAD)) + "".join(_row(r, rows) for r in rows)
        yield _by_text(rows)


def ratio(scores: Scores, rounding: Scores) -> tuple[float, float]:
    """Mean KLD over rounding's, and its standard error over windows in pairs (delta method)."""
    over = fmean(scores.kld) / fmean(rounding.kld)
    residuals = [a - over * b for a, b in zip(scores.kld, rounding.kld, strict=True)]
    error = stdev(residuals) / math.sqrt(len(residuals)) if len(residuals) > 1 else math.nan
    return over, error / fmean(rounding.kld)


def _scheme(record: Record) -> tuple[bool, int]:
    """llama.cpp's types last, the others by their group size."""
    size = record.scheme.rpartition("g")[2]
    return METHODS[record.method].grid is None, int(size) if size.isdigit() else 0


def _row(record: Record, rows: list[Record]) -> str:
    method = METHODS[record.method]
    growth = {k: math.exp(fmean(s.nll) - fmean(s.reference_nll)) for k, s in record.texts.items()}
    worst = max(growth, key=growth.__getitem__)
    linears = record.bits_per_weight_quantized
    mean, most = _against(record, rows)
    learned = "" if record.iters is None else f", iters {record.iters}"
    return _line([
        method.label + learned,
        record.scheme,
        record.maker,
        f"{record.bits_per_weight:.2f} / " + ("–" if linears is None else f"{linears:.2f}"),
        f"{fmean(fmean(s.kld) for s in record.texts.values()):.4f}",
        mean,
        most,
        f"{fmean(fmean(s.top1) for s in record.texts.values()):.1%}",
        f"{fmean(growth.values()):.3f}",
        f"{growth[worst]:.3f} {worst}",
        "–" if record.seconds is None else f"{record.seconds:.0f}",
    ])  # fmt: skip


def _against(record: Record, rows: list[Record]) -> tuple[str, str]:
    """Mean and worst of the ratios to rounding; a dash where there is none of the same grid."""
    grid = METHODS[record.method].grid
    plain = [r for r in rows if (r.method, r.scheme) == (f"rtn-{grid}", record.scheme)]
    if not plain or record in plain:
        return "–", "–"
    found = {kind: ratio(s, plain[0].texts[kind]) for kind, s in record.texts.items()}
    worst = max(found, key=lambda kind: found[kind][0])
    mean = fmean(over for over, _ in found.values())
    error = math.sqrt(sum(e**2 for _, e in found.values())) / len(found)
    return f"{mean:.2f} ± {error:.2f}", f"{found[worst][0]:.2f} ± {found[worst][1]:.2f} {worst}"


def _by_text(rows: list[Record]) -> str:
    """KLD and perplexity of each text."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.texts))
    source = {
        kind: math.exp(fmean(row.texts[kind].reference_nll)) for row in rows for kind in row.texts
    }
    lines = _line(["KLD (ppl)", "scheme", "by", *kinds]) + _line(["---"] * (3 + len(kinds)))
    lines += _line(["the source", "", "", *(f"(ppl {source[kind]:.2f})" for kind in kinds)])
    for row in rows:
        cells = [
            f"{fmean(scores.kld):.4f} ({math.exp(fmean(scores.nll)):.2f})"
            for scores in map(row.texts.__getitem__, kinds)
        ]
        lines += _line([METHODS[row.method].label, row.scheme, row.maker, *cells])
    return lines


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |\n"
