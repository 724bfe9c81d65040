"""The answer in plain words: what was compared, what can be told apart, and what cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.ledger import Ledger, Metric, Row
from quantkit.report.format import count, fixed, number, plus_minus, signed, size
from quantkit.report.noise import (
    THROUGHPUT_MARGIN,
    Z95,
    Served,
    at_chance,
    comparable,
    differ,
    error_of_difference,
    fastest,
    tiers,
)
from quantkit.report.prose import Name, Prose, listing
from quantkit.report.table import (
    accuracies,
    concurrencies,
    drift,
    engines,
    served,
    task_title,
)

_MARGIN = f"{100 * THROUGHPUT_MARGIN:.0f} %"


@dataclass(frozen=True)
class Headline:
    """One of the few answers on top: the question, who it is, and by what number."""

    question: str
    answer: Prose
    evidence: Prose


@dataclass(frozen=True)
class Finding:
    """What one kind of measurement says."""

    about: str
    text: Prose


def compared(ledger: Ledger) -> Prose:
    """What this report is about, in one sentence."""
    made = ledger.variants[1:]
    used = sorted({engine for row in ledger.variants for engine in engines(row)})
    return (
        "1 quantized variant of " if len(made) == 1 else f"{len(made)} quantized variants of ",
        Name(ledger.source.id),
        f" ({count(ledger.source.parameters)} parameters), ",
        "compared with the unquantized original (",
        Name(ledger.reference.spec),
        ")",
        *((", and served by ", *listing(used)) if used else ()),
        ".",
    )


def headlines(ledger: Ledger) -> list[Headline]:
    """Nearest to the original, smallest, fastest: ties inside the noise are named together."""
    found = [_nearest(ledger), _smallest(ledger), _fastest(ledger)]
    return [headline for headline in found if headline]


def findings(ledger: Ledger) -> list[Finding]:
    """One paragraph a kind of measurement, in the order in which they are to be trusted."""
    found = [_divergence(ledger), _perplexity(ledger)]
    found += [_accuracy(ledger, name) for name in accuracies(ledger)]
    found += [_throughput(ledger, concurrency) for concurrency in concurrencies(ledger)]
    return [finding for finding in found if finding] + _failures(ledger)


def divergences(ledger: Ledger) -> dict[str, Metric]:
    """``kld_mean`` of the variants, of one protocol: the first one's."""
    found = {row.id: row.metrics["kld_mean"] for row in ledger.variants[1:] if _has_kld(row)}
    first = next(iter(found.values()), None)
    return {id_: metric for id_, metric in found.items() if comparable(metric, first)}


def _has_kld(row: Row) -> bool:
    return "kld_mean" in row.metrics


def _nearest(ledger: Ledger) -> Headline | None:
    metrics = divergences(ledger)
    groups = tiers(metrics)
    if not groups:
        return None
    lowest = metrics[groups[0][0]]
    ids = [id_ for id_ in groups[0] if differ(metrics[id_], lowest) is False]
    return Headline(
        "Nearest to the original",
        listing(ids),
        (
            "KL divergence ",
            " to ".join(dict.fromkeys(_value(metrics[i]) for i in (ids[0], ids[-1]))),
            " nats per token",
            *_agreement(ledger, ids[0] if len(ids) == 1 else None),
            "" if len(ids) == 1 else "; not told apart",
        ),
    )


def _agreement(ledger: Ledger, id_: str | None) -> Prose:
    metric = next((r.metrics.get("top1_agreement") for r in ledger.variants if r.id == id_), None)
    if metric is None:
        return ()
    return (f"; same next token at {fixed(100 * metric.value, 1)} % of positions",)


def _smallest(ledger: Ledger) -> Headline | None:
    sizes = {row.id: row.bytes for row in ledger.variants[1:] if row.bytes is not None}
    if not sizes:
        return None
    least = min(sizes.values())
    ids = [id_ for id_, value in sizes.items() if value == least]
    evidence = size(least)
    if ledger.reference.bytes:
        share = 100 * least / ledger.reference.bytes
        evidence += f", {number(share, 2)} % of the original's {size(ledger.reference.bytes)}"
    return Headline("Smallest on disk", listing(ids), (evidence,))


def _fastest(ledger: Ledger) -> Headline | None:
    if not concurrencies(ledger):
        return None
    concurrency = concurrencies(ledger)[-1]
    best = fastest(served(ledger, concurrency))
    if not best:
        return None
    evidence = f"{_rate(best[0])} output tokens/s"
    if len(best) > 1:
        evidence = f"{_rate(best[-1])} to {evidence}; less than {_MARGIN} apart, so not ranked"
    return Headline(f"Fastest with {load(concurrency)}", _on_engines(best), (evidence,))


def _divergence(ledger: Ledger) -> Finding | None:
    metrics = divergences(ledger)
    groups = tiers(metrics)
    if not groups:
        return None
    text: Prose = ("From nearest to farthest: ",)
    for index, group in enumerate(groups):
        text += ("; then " if index else "", *listing(group))
        values = dict.fromkeys(_value(metrics[id_]) for id_ in (group[0], group[-1]))
        text += (f" ({' to '.join(values)}",)
        text += (", not told apart)" if len(group) > 1 else ")",)
    return Finding("KL divergence", (*text, ". This is the sharpest of the measures here."))


def _perplexity(ledger: Ledger) -> Finding | None:
    def worth(pair: tuple[Metric, Metric]) -> str:
        return f"{signed(100 * (pair[0].value / pair[1].value - 1), 1)} %"

    return _against_reference(ledger, "ppl", "Perplexity", worth)


def _accuracy(ledger: Ledger, name: str) -> Finding | None:
    def worth(pair: tuple[Metric, Metric]) -> str:
        return f"{signed(100 * (pair[0].value - pair[1].value), 1)} points"

    title = task_title(name)
    finding = _against_reference(ledger, name, title, worth)
    there = ledger.reference.metrics.get(name)
    if finding is None or there is None:
        return finding
    text = finding.text
    error = error_of_difference(there, there)
    if error:
        points = fixed(100 * Z95 * error, 1)
        text += (f" With {there.n:,} questions, only differences above some {points} points show.",)
    if at_chance(name, there):
        text += (
            " The original itself cannot be told from guessing here, so this says little about "
            "what quantization does.",
        )
    return Finding(title, text)


def _against_reference(
    ledger: Ledger, name: str, title: str, worth: Callable[[tuple[Metric, Metric]], str]
) -> Finding | None:
    """Who differs from the reference in ``name``, with its drift, and who does not."""
    same: list[str] = []
    text: Prose = ()
    for row in ledger.variants[1:]:
        pair = drift(row, ledger.reference, name)
        verdict = differ(*pair) if pair else None
        if pair and verdict:
            text += ("; " if text else "", Name(row.id), f" ({worth(pair)})")
        elif verdict is False:
            same.append(row.id)
    if not text and not same:
        return None
    if text:
        text = ("Different from the original: ", *text, ". ")
    if same:
        text += ("Indistinguishable from the original: ", *listing(same), ".")
    return Finding(title, text)


def _throughput(ledger: Ledger, concurrency: int) -> Finding | None:
    everyone = served(ledger, concurrency)
    best = fastest(everyone)
    if not best:
        return None
    text: Prose = (*_on_engines(best), f": {_rate(best[0])} output tokens/s")
    if len(best) > 1:
        text += (f" at the most; less than {_MARGIN} apart, so not ranked",)
    originals = [one for one in everyone if one.row is ledger.reference]
    slowest = min(originals, key=lambda one: one.bench.output_tokens_per_s, default=None)
    if slowest and slowest not in best and slowest.bench.output_tokens_per_s > 0:
        times = best[0].bench.output_tokens_per_s / slowest.bench.output_tokens_per_s
        text += (f". That is {number(times, 2)} times the ", *_on_engines([slowest]))
    return Finding(f"Throughput, {load(concurrency)}", (*text, "."))


def _failures(ledger: Ledger) -> list[Finding]:
    failed = [row for row in ledger.variants if row.failed]
    if not failed:
        return []
    text: Prose = ()
    for row in failed:
        assert row.failed is not None
        text += ("; " if text else "", Name(row.id), " at ", Name(row.failed.stage))
    return [Finding("Failed", (*text, ". The table has the reason."))]


def load(concurrency: int) -> str:
    """How many requests run at the same time, in words."""
    return "1 request at a time" if concurrency == 1 else f"{concurrency} requests at a time"


def _value(metric: Metric) -> str:
    return " ".join(plus_minus(metric.value, metric.stderr)).strip()


def _on_engines(ones: list[Served]) -> Prose:
    """``a and b on vllm, c on llamacpp``."""
    text: Prose = ()
    for engine in dict.fromkeys(one.engine for one in ones):
        ids = [one.row.id for one in ones if one.engine == engine]
        text += (", " if text else "", *listing(ids), f" on {engine}")
    return text


def _rate(one: Served) -> str:
    return number(one.bench.output_tokens_per_s)
