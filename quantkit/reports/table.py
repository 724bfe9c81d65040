"""The table of all variants: which columns there are, and what each row says in them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from quantkit.ledger import Ledger, Metric, Row, is_accuracy
from quantkit.ledger.load import Bench
from quantkit.recommendation.nearness import divergences, mean, worst_text
from quantkit.reports import texts
from quantkit.reports.format import NOTHING, fixed, milliseconds, number, plus_minus, signed, size
from quantkit.reports.noise import Served, against_reference


@dataclass(frozen=True)
class Cell:
    """What a cell says, a second line in small print, the number that it is sorted by and that a
    CSV file has, as the ledger has it, and the number's standard error."""

    text: str
    detail: str = ""
    sort: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Column:
    """One column: the group over it, its title, and what it is in a sentence."""

    group: str
    title: str
    explanation: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Columns of equal length, one cell a row of the ledger; quality first, then speed."""

    rows: tuple[Row, ...]
    quality: tuple[Column, ...]
    engine: Column
    """What served each row; it belongs to the speed."""
    speed: tuple[Column, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        """All that have numbers, from left to right."""
        return self.quality + self.speed

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Titles of neighbouring columns of one group, with how many they are."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found


def table(ledger: Ledger) -> Table:
    """Every row of the ledger, in its order."""
    names = texts.names(ledger)
    several = texts.several(ledger)
    drift = _over_texts(ledger) if several else [c for text in names for c in _of(ledger, text)]
    quality = [
        *_storage(ledger),
        *drift,
        *(column for name in accuracies(ledger) for column in _accuracy(ledger, name)),
    ]
    speed = [column for load in shown(concurrencies(ledger)) for column in _speed(ledger, load)]
    return Table(tuple(ledger.variants), tuple(quality), _engines(ledger), tuple(speed))


def by_text(ledger: Ledger) -> Table | None:
    """The drift of every variant on each of several texts."""
    if not texts.several(ledger):
        return None
    columns = [
        column
        for text in texts.names(ledger)
        for column in _of(ledger, text, texts.title(ledger, text))
    ]
    return Table(tuple(ledger.variants), tuple(columns), _engines(ledger), ())


def everything(ledger: Ledger) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Names of all metrics, and each row's values by them: nothing in a ledger is left out."""
    keys = dict.fromkeys((t, name) for row in ledger.variants for t, name, _ in row.all_metrics)
    several = texts.several(ledger)
    names = [f"{text} {name}" if text is not None and several else name for text, name in keys]
    rows = [row for row in ledger.variants if row.texts or row.metrics]
    return names, [
        (row.id, [_metric(row.metric(name, text)) for text, name in keys]) for row in rows
    ]


def accuracies(ledger: Ledger) -> list[str]:
    """Names of all accuracies that any row has."""
    return sorted({name for row in ledger.variants for name in row.metrics if is_accuracy(name)})


def concurrencies(ledger: Ledger) -> list[int]:
    """Every number of concurrent requests that was benched, ascending."""
    return sorted({bench.concurrency for row in ledger.variants for bench in row.bench})


def shown(levels: list[int]) -> list[int]:
    """Three of many concurrencies: the lowest, the middle one and the highest."""
    if len(levels) <= 3:
        return levels
    middle = math.sqrt(levels[0] * levels[-1])
    between = min(levels[1:-1], key=lambda level: (round(abs(math.log(level / middle)), 6), -level))
    return [levels[0], between, levels[-1]]


def task_title(name: str) -> str:
    """``mmlu_acc`` as people write it: ``MMLU``; with a filter of answers ``GSM8K (strict-match)``,
    from ``gsm8k_exact_match_strict-match``."""
    task, _, filter_ = name.removesuffix("_acc").partition("_exact_match")
    title = task.replace("_", " ").upper()
    return f"{title} ({filter_.removeprefix('_')})" if filter_ else title


def engines(row: Row) -> list[str]:
    """Every engine that served the row in a bench."""
    return sorted({str(bench.engine) for bench in row.bench})


def bench_of(row: Row, engine: str, concurrency: int) -> Bench | None:
    """What this engine delivered at this concurrency; None where it was not measured."""
    for bench in row.bench:
        if str(bench.engine) == engine and bench.concurrency == concurrency:
            return bench
    return None


def served(ledger: Ledger, concurrency: int) -> list[Served]:
    """Every row on every engine that served it at this concurrency."""
    found = [
        (row, bench_of(row, engine, concurrency))
        for row in ledger.variants
        for engine in engines(row)
    ]
    return [Served(row, bench) for row, bench in found if bench]


def _storage(ledger: Ledger) -> list[Column]:
    rows = ledger.variants
    return [
        Column("Size", "on disk", "Bytes of the weight files.", _each(rows, "bytes")),
        Column(
            "Size",
            "bits/weight",
            "Bits per weight over all tensors; in small print over the quantized ones only.",
            tuple(_bits(row) for row in rows),
        ),
    ]


def _each(rows: list[Row], attribute: str) -> tuple[Cell, ...]:
    values = [getattr(row, attribute) for row in rows]
    return tuple(Cell(size(value), sort=value) for value in values)


def _bits(row: Row) -> Cell:
    if row.bits_per_weight is None:
        return Cell(NOTHING)
    inner = row.bits_per_weight_quantized
    detail = f"{fixed(inner, 2)} quantized" if inner is not None else ""
    return Cell(fixed(row.bits_per_weight, 2), detail, row.bits_per_weight)


def _of(ledger: Ledger, text: str, group: str | None = None) -> list[Column]:
    """One text; its columns stand in two groups, or in one that is named after it."""
    rows = ledger.variants
    surprise, drift = group or "Perplexity", group or "Drift from the reference"
    return [
        Column(
            surprise,
            "perplexity" if group else "value",
            "Perplexity ± standard error; lower is better.",
            tuple(_metric(row.metric("ppl", text)) for row in rows),
        ),
        Column(
            surprise,
            "drift",
            "Change of the perplexity against the reference, in percent, and the verdict.",
            tuple(_drift(row, ledger, "ppl", text) for row in rows),
        ),
        Column(
            drift,
            "KLD mean",
            "Mean KL divergence from the reference, nats per token ± standard error.",
            tuple(_metric(row.metric("kld_mean", text)) for row in rows),
        ),
        Column(
            drift,
            "KLD p99",
            "The KL divergence that 99 % of the tokens stay below, nats.",
            tuple(_metric(row.metric("kld_p99", text)) for row in rows),
        ),
        Column(
            drift,
            "top-1",
            "How often the most likely next token is the reference's.",
            tuple(_metric(row.metric("top1_agreement", text), percent=True) for row in rows),
        ),
        Column(
            drift,
            "Δp RMS",
            "Root mean square of the change of the true token's probability, percent.",
            tuple(_metric(row.metric("delta_p_rms", text), percent=True) for row in rows),
        ),
    ]


def _over_texts(ledger: Ledger) -> list[Column]:
    """Several texts together: the mean of the drift, and the worst."""
    rows = ledger.variants
    group = f"Drift on {len(ledger.texts)} texts"
    return [
        Column(
            group,
            "KLD, mean of texts",
            "Mean KL divergence, nats per token ± standard error; each text counts alike.",
            tuple(_mean(row) for row in rows),
        ),
        Column(
            group,
            "KLD, worst text",
            "Mean KL divergence on the text where it is the greatest, and which that is.",
            tuple(_worst(row, ledger) for row in rows),
        ),
        Column(
            group,
            "perplexity, worst",
            "Change of the perplexity against the reference on the text where it rises most.",
            tuple(_worst_rise(row, ledger) for row in rows),
        ),
        Column(
            group,
            "top-1, worst",
            "How often the most likely next token is the reference's, where it is most seldom.",
            tuple(_worst_agreement(row, ledger) for row in rows),
        ),
    ]


def _mean(row: Row) -> Cell:
    metrics = divergences(row.texts)
    if not metrics:
        return Cell(NOTHING)
    value, error = mean(metrics.values())
    return Cell(*plus_minus(value, error), value, error)


def _worst(row: Row, ledger: Ledger) -> Cell:
    text = worst_text(row.texts)
    if text is None:
        return Cell(NOTHING)
    cell = _metric(row.metric("kld_mean", text))
    return cell if row is ledger.reference else _on(cell, text)


def _worst_rise(row: Row, ledger: Ledger) -> Cell:
    found = {
        text: one.drift
        for text in texts.names(ledger)
        if (one := against_reference(ledger, row, "ppl", text))
    }
    if not found:
        return Cell(NOTHING)
    text = max(found, key=found.__getitem__)
    return _on(_drift(row, ledger, "ppl", text), text)


def _worst_agreement(row: Row, ledger: Ledger) -> Cell:
    found = row.by_text("top1_agreement")
    if not found:
        return Cell(NOTHING)
    text = min(found, key=lambda text: found[text].value)
    cell = _metric(found[text], percent=True)
    return cell if row is ledger.reference else _on(cell, text)


def _on(cell: Cell, text: str) -> Cell:
    """With the text's name in small print."""
    return replace(cell, detail=f"{cell.detail} on {text}".strip())


def _accuracy(ledger: Ledger, name: str) -> list[Column]:
    title = task_title(name)
    return [
        Column(
            title,
            "accuracy",
            f"{title} accuracy ± standard error, percent.",
            tuple(_metric(row.metrics.get(name), percent=True) for row in ledger.variants),
        ),
        Column(
            title,
            "drift",
            f"Change of the {title} accuracy against the reference, in points, and the verdict.",
            tuple(_drift(row, ledger, name) for row in ledger.variants),
        ),
    ]


def _metric(metric: Metric | None, *, percent: bool = False) -> Cell:
    if metric is None:
        return Cell(NOTHING)
    scale = 100.0 if percent else 1.0
    error = metric.stderr * scale if metric.stderr is not None else None
    value, detail = plus_minus(metric.value * scale, error)
    if percent and not detail:
        value = fixed(metric.value * scale, 1)
    text = value + (" %" if percent else "")
    return Cell(text, detail, _sortable(metric.value), metric.stderr)


def _drift(row: Row, ledger: Ledger, name: str, text: str | None = None) -> Cell:
    """Against the reference, with the verdict in small print."""
    here, there = row.metric(name, text), ledger.reference.metric(name, text)
    if row is ledger.reference or here is None or there is None:
        return Cell(NOTHING)
    comparison = against_reference(ledger, row, name, text)
    if comparison is None:
        return Cell(NOTHING, "" if here.protocol == there.protocol else "other protocol")
    drift = comparison.drift
    if comparison.unit == "points":
        return Cell(f"{signed(drift, 1)} pt", comparison.verdict, drift)
    return Cell(f"{signed(drift, 2 if abs(drift) < 10 else 1)} %", comparison.verdict, drift)


def _engines(ledger: Ledger) -> Column:
    cells = tuple(Cell("\n".join(engines(row)) or NOTHING) for row in ledger.variants)
    return Column("Serving", "engine", "What served the variant in the bench.", cells)


def _speed(ledger: Ledger, concurrency: int) -> list[Column]:
    group = f"{concurrency} requests at a time" if concurrency > 1 else "1 request at a time"
    found = [
        [bench_of(row, engine, concurrency) for engine in engines(row)] for row in ledger.variants
    ]
    return [
        Column(
            group,
            "tokens/s",
            "Output tokens per second of all requests together; higher is better.",
            tuple(_rate(row) for row in found),
        ),
        Column(
            group,
            "TTFT p50",
            "Median time to the first token; lower is better.",
            tuple(_first_token(row) for row in found),
        ),
    ]


def _rate(found: list[Bench | None]) -> Cell:
    """One line an engine, sorted by the first that was measured."""
    lines = [number(bench.output_tokens_per_s if bench else None) for bench in found]
    measured = [bench for bench in found if bench]
    errors = sum(bench.errors for bench in measured)
    return Cell(
        "\n".join(lines) or NOTHING,
        f"{errors} failed" if errors else "",
        _sortable(measured[0].output_tokens_per_s) if measured else None,
    )


def _first_token(found: list[Bench | None]) -> Cell:
    lines = [milliseconds(bench.ttft_ms.p50) if bench else NOTHING for bench in found]
    measured = [bench for bench in found if bench]
    sort = _sortable(measured[0].ttft_ms.p50) if measured else None
    return Cell("\n".join(lines) or NOTHING, sort=sort)


def _sortable(value: float) -> float | None:
    return value if math.isfinite(value) else None
