"""The answer in plain words: what was compared, what can be told apart, and what cannot."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantkit.ledger import Ledger, Metric, Row
from quantkit.ledger.drift import Comparison
from quantkit.recommendation.nearness import divergences, mean, worst_text
from quantkit.reports import texts
from quantkit.reports.drifts import UNITS, asked, roughly, said
from quantkit.reports.format import count, fixed, number, plus_minus, size, span
from quantkit.reports.noise import (
    Served,
    against_reference,
    at_chance,
    fastest,
    nearest_on_worst_text,
    tiers,
)
from quantkit.reports.prose import Name, Prose, listing
from quantkit.reports.table import accuracies, concurrencies, engines, served, shown, task_title


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
        "compared with the unquantized reference (",
        Name(ledger.reference.spec),
        ")",
        *((", and served by ", *listing(used)) if used else ()),
        ".",
    )


def headlines(ledger: Ledger) -> list[Headline]:
    """Nearest to the reference, smallest, fastest: ties inside the noise are named together."""
    found = [_nearest(ledger), _smallest(ledger), _fastest(ledger)]
    return [headline for headline in found if headline]


def findings(ledger: Ledger) -> list[Finding]:
    """One paragraph a kind of measurement, in the order in which they are to be trusted."""
    found = [_over_texts(ledger)] if texts.several(ledger) else []
    for text in texts.names(ledger):
        on = texts.on(ledger, text)
        found.append(_divergence(ledger, text, f"KL divergence{on}"))
        found.append(_against_reference(ledger, "ppl", text, f"Perplexity{on}"))
    found += [_accuracy(ledger, name) for name in accuracies(ledger)]
    found += [_throughput(ledger, concurrency) for concurrency in shown(concurrencies(ledger))]
    return [finding for finding in found if finding] + _failures(ledger)


def _divergences(ledger: Ledger, text: str) -> tuple[dict[str, Metric], list[list[str]]]:
    """``kld_mean`` of the variants, and the groups that the data tell apart, nearest first."""
    metrics = {
        row.id: metric
        for row in ledger.variants[1:]
        if (metric := row.metric("kld_mean", text)) and math.isfinite(metric.value)
    }
    return metrics, [list(metrics)] if len(metrics) == 1 else tiers(ledger, "kld_mean", text)


def _nearest(ledger: Ledger) -> Headline | None:
    if texts.several(ledger):
        return _nearest_of_several(ledger)
    if not ledger.texts:
        return None
    metrics, groups = _divergences(ledger, ledger.texts[0].name)
    if not groups:
        return None
    ids = groups[0]
    return Headline(
        "Nearest to the reference",
        listing(ids),
        (
            "KL divergence ",
            " to ".join(dict.fromkeys(_value(metrics[i]) for i in (ids[0], ids[-1]))),
            " nats per token",
            *_agreement(ledger, ids[0] if len(ids) == 1 else None),
            "" if len(ids) == 1 else "; not told apart",
        ),
    )


def _nearest_of_several(ledger: Ledger) -> Headline | None:
    """What the drift on the worst text says."""
    groups = nearest_on_worst_text(ledger)
    if not groups:
        return None
    ids = groups[0]
    rows = {row.id: row for row in ledger.variants}
    evidence: Prose = ("KL divergence ", *_mean_and_worst(rows[ids[0]]))
    if len(ids) > 1:
        evidence += ("; not told apart",)
    return Headline("Nearest to the reference", listing(ids), evidence)


def _over_texts(ledger: Ledger) -> Finding | None:
    """Each variant's divergence on average and at its worst, nearest first."""
    rows = {row.id: row for row in ledger.variants}
    text: Prose = ()
    for group in nearest_on_worst_text(ledger):
        for index, id_ in enumerate(group):
            text += ("; " if text else "", Name(id_), " ", *_mean_and_worst(rows[id_]))
            if index and index == len(group) - 1:
                text += (" (not told apart on the worst text)",)
    if not text:
        return None
    for name, share in texts.calibration_shares(ledger).items():
        text += (". ", Name(name), f" is {texts.alike(share)}")
    return Finding(f"Drift on {len(ledger.texts)} texts", ("KL divergence: ", *text, "."))


def _mean_and_worst(row: Row) -> Prose:
    """``0.021 nats on average, worst 0.038 on stdlib:code``."""
    metrics, text = divergences(row.texts), worst_text(row.texts)
    assert text is not None
    average = " ".join(plus_minus(*mean(metrics.values()))).strip()
    return f"{average} nats on average, worst {_value(metrics[text])} on ", Name(text)


def _agreement(ledger: Ledger, id_: str | None) -> Prose:
    found = next((row.by_text("top1_agreement") for row in ledger.variants if row.id == id_), {})
    return tuple(
        f"; same next token at {fixed(100 * metric.value, 1)} % of positions"
        for metric in found.values()
    )


def _smallest(ledger: Ledger) -> Headline | None:
    sizes = {row.id: row.bytes for row in ledger.variants[1:] if row.bytes is not None}
    if not sizes:
        return None
    least = min(sizes.values())
    ids = [id_ for id_, value in sizes.items() if value == least]
    evidence = size(least)
    if ledger.reference.bytes:
        share = 100 * least / ledger.reference.bytes
        evidence += f", {number(share, 2)} % of the reference's {size(ledger.reference.bytes)}"
    return Headline("Smallest on disk", listing(ids), (evidence,))


def _fastest(ledger: Ledger) -> Headline | None:
    if not concurrencies(ledger):
        return None
    concurrency = concurrencies(ledger)[-1]
    best = fastest(served(ledger, concurrency))
    if not best:
        return None
    evidence: Prose = (f"{span(best[0].throughput)} output tokens/s",)
    if len(best) == 2:
        evidence += ("; ", *_on_engines(best[1:]), " cannot be told from it")
    elif len(best) > 2:
        evidence += (f"; {len(best) - 1} others cannot be told from it",)
    return Headline(f"Fastest with {load(concurrency)}", _on_engines(best[:1]), evidence)


def _divergence(ledger: Ledger, text: str, title: str) -> Finding | None:
    metrics, groups = _divergences(ledger, text)
    if not groups:
        return None
    said: Prose = ("From nearest to farthest: ",)
    for index, group in enumerate(groups):
        said += ("; then " if index else "", *listing(group))
        values = dict.fromkeys(_value(metrics[id_]) for id_ in (group[0], group[-1]))
        said += (f" ({' to '.join(values)}",)
        said += (", not told apart)" if len(group) > 1 else ")",)
    said += (
        ". This is the sharpest of the measures here." if text == texts.names(ledger)[0] else ".",
    )
    return Finding(title, said)


def _accuracy(ledger: Ledger, name: str) -> Finding | None:
    finding = _against_reference(ledger, name, None, task_title(name))
    there = ledger.reference.metrics.get(name)
    if finding is None or there is None or not at_chance(name, there):
        return finding
    return Finding(
        finding.about,
        (
            *finding.text,
            " The reference itself cannot be told from guessing here, so this says little about "
            "what quantization does.",
        ),
    )


def _against_reference(ledger: Ledger, name: str, text: str | None, title: str) -> Finding | None:
    """Which variants are worse, better or equivalent, with the drift, and which are undecided."""
    found = [
        comparison
        for row in ledger.variants[1:]
        if (comparison := against_reference(ledger, row, name, text))
    ]
    if not found:
        return None
    first = found[0]
    sentences: list[Prose] = []
    for verdict, words in (
        ("worse", "Worse than the reference: "),
        ("better", "Better than the reference: "),
        (
            "equivalent",
            f"Equivalent to the reference, within ±{first.tolerance:g} {UNITS[first.unit]}: ",
        ),
        ("undecided", "Undecided: "),
    ):
        ones = [one for one in found if one.verdict == verdict]
        listed: Prose = ()
        for one in ones:
            after = f" after {asked(one)} questions" if one.of else ""
            listed += (", " if listed else "", Name(one.b), f" ({said(one)}{after})")
        if ones:
            sentences.append((words, *listed, "."))
    sentences += _to_decide([one for one in found if one.verdict == "undecided"])
    joined = tuple(part for sentence in sentences for part in (*sentence, " "))[:-1]
    return Finding(title, joined)


def _to_decide(undecided: list[Comparison]) -> list[Prose]:
    """How much more it would take: from the easiest to the hardest."""
    counts = sorted(one.more for one in undecided if one.more is not None)
    if not counts:
        return []
    items = "windows" if undecided[0].flips is None else "questions"
    shown = list(dict.fromkeys(map(roughly, (counts[0], counts[-1]))))
    return [
        (f"To decide would take some {' to '.join(shown)} more {items} than ",
         "were asked." if undecided[0].of else f"these {undecided[0].n:,}.")
    ]  # fmt: skip


def _throughput(ledger: Ledger, concurrency: int) -> Finding | None:
    everyone = served(ledger, concurrency)
    best = fastest(everyone)
    if not best:
        return None
    text: Prose = (*_on_engines(best), f": {span(best[0].throughput)} output tokens/s")
    if len(best) > 1:
        text += (" at the most; their intervals overlap, so not ranked",)
    references = [one for one in everyone if one.row is ledger.reference]
    slowest = min(references, key=lambda one: one.throughput.value, default=None)
    if slowest and slowest not in best and slowest.throughput.value > 0:
        times = best[0].throughput.over(slowest.throughput)
        text += (f". That is {span(times, _times)} times the ", *_on_engines([slowest]))
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


def _times(ratio: float) -> str:
    return number(ratio, 2)
