"""How each number came about: what it means, on what it was measured, by which protocol."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from quantkit.ledger import Ledger, Metric, is_accuracy
from quantkit.reports.table import task_title

_MEANINGS = {
    "ppl": (
        "Perplexity",
        "How surprised the model is by the evaluation text: the exponential of its mean negative "
        "log likelihood, over windows that do not overlap, with only the later part of each "
        "scored. Lower is better. The protocol is that of llama.cpp's llama-perplexity, so the "
        "numbers are comparable with published tables. Its drift is the ratio to the reference's, "
        "tested over paired windows (t-test).",
    ),
    "ppl_ratio": (
        "Perplexity ratio",
        "The variant's perplexity over the reference's, with the error of the paired tokens, as "
        "llama-perplexity --kl-divergence prints it.",
    ),
    "kld": (
        "KL divergence",
        "How far the variant's distribution over the next token is from the reference's: "
        "D(reference ‖ variant) in nats, over the whole vocabulary, at the same scored positions. "
        "0 means the same distribution everywhere. Mean, median, 99th percentile and maximum.",
    ),
    "agreement": (
        "Agreement of the most likely tokens",
        "Top-1: the share of scored positions at which the variant's most likely next token is "
        "also the reference's. Top-5: the share of the reference's five most likely tokens that "
        "are among the variant's five.",
    ),
    "delta_p": (
        "Change of the true token's probability (Δp)",
        "The probability that the variant gives to the true next token, minus the "
        "reference's: its mean, root mean square and quantiles. Positive is better. Defined as in "
        "llama-perplexity --kl-divergence.",
    ),
    "prompts": (
        "Answers to prompts",
        "Greedy answers of the variant and of the reference to the same prompts: the share that "
        "are equal token by token, and as text without surrounding space, the mean length, and the "
        "KL divergence along the reference's answers, which both models read (nats per token, its "
        "error clustered by prompt).",
    ),
    "non_finite": (
        "Non-finite logits",
        "At how many scored positions a logit is NaN or infinite. With any such position nothing "
        "else is computed, and the row fails with their count.",
    ),
}
_ACCURACY = (
    "How many questions the model answers right, through lm-eval's own metric code. Its standard "
    "error is that of a proportion over the questions. Its drift is tested on the answers that "
    "flipped: exact McNemar test, bootstrap interval over questions, Tango's test of equivalence."
)
_STOPPED = (
    "How many questions the model answers right, through lm-eval's own metric code, with the "
    "standard error of a random sample. The questions were asked in one random order, until the "
    "verdict against the reference was decided or the remaining ones could not decide it. "
    "The drift is tested by bets, which are valid wherever one stops; if all were asked, also by "
    "McNemar's and Tango's tests. The two share the 5 %."
)
_BENCH = (
    "The engine's own server, driven over its OpenAI API by a load generator that keeps the "
    "stated number of requests running. Throughput counts the output tokens of all requests "
    "together. TTFT is the time from a request to its first token, ITL the time from one token "
    "to the next; percentiles are over completed requests."
)


@dataclass(frozen=True)
class Way:
    """Rows that were measured in the same way."""

    ids: tuple[str, ...]
    engines: tuple[str, ...]
    n: int | None
    protocol: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Measured:
    """One kind of measurement: what it is, and each way in which it was done."""

    title: str
    meaning: str
    unit: str
    """What ``n`` counts."""
    ways: tuple[Way, ...]

    @property
    def engines(self) -> list[str]:
        """Every engine that had a part in it."""
        return list(dict.fromkeys(engine for way in self.ways for engine in way.engines))

    @property
    def counts(self) -> list[str]:
        """Every ``n`` that occurs."""
        return list(dict.fromkeys(f"{way.n:,}" for way in self.ways if way.n is not None))


def measured(ledger: Ledger) -> list[Measured]:
    """Everything that was measured, in the order of the table."""
    families: dict[str, list[tuple[str, Metric]]] = {}
    for row in ledger.variants:
        for _, name, metric in row.all_metrics:
            families.setdefault(_family(name), []).append((row.id, metric))
    order = {name: index for index, name in enumerate(_MEANINGS)}
    found = [
        _metric_family(name, families[name])
        for name in sorted(families, key=lambda name: (order.get(name, len(order)), name))
    ]
    benched = [
        ((bench.protocol, None), row.id, str(bench.engine))
        for row in ledger.variants
        for bench in row.bench
    ]
    if benched:
        found.append(Measured("Throughput and latency", _BENCH, "", _ways(benched)))
    return found


def pairs(mapping: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Keys and values as text; what is nested is JSON."""
    return tuple(
        (
            key,
            json.dumps(value, ensure_ascii=False)
            if isinstance(value, dict | list | bool) or value is None
            else str(value),
        )
        for key, value in mapping.items()
    )


def recipe_text(ledger: Ledger) -> str:
    """The resolved recipe as YAML."""
    import yaml

    text: str = yaml.safe_dump(ledger.recipe, sort_keys=False, allow_unicode=True)
    return text


def _family(name: str) -> str:
    """``kld_mean`` and its likes are one measurement."""
    if name in ("top1_agreement", "top5_agreement"):
        return "agreement"
    return next(
        (family for family in ("kld", "delta_p", "prompts") if name.startswith(f"{family}_")), name
    )


def _metric_family(name: str, metrics: list[tuple[str, Metric]]) -> Measured:
    ways = _ways(
        [((metric.protocol, metric.n), id_, str(metric.engine)) for id_, metric in metrics]
    )
    if is_accuracy(name):
        stopped = any("until" in metric.protocol for _, metric in metrics)
        meaning = _STOPPED if stopped else _ACCURACY
        return Measured(f"{task_title(name)} accuracy", meaning, "questions", ways)
    title, meaning = _MEANINGS.get(name, (name, ""))
    unit = "prompts" if name == "prompts" else "positions" if meaning else "items"
    return Measured(title, meaning, unit, ways)


def _ways(
    found: Iterable[tuple[tuple[dict[str, Any], int | None], str, str]],
) -> tuple[Way, ...]:
    """Put what has the same protocol and ``n`` together."""
    groups: list[tuple[tuple[dict[str, Any], int | None], dict[str, None], dict[str, None]]] = []
    for way, id_, engine in found:
        for known, ids, engines in groups:
            if known == way:
                ids[id_] = None
                engines[engine] = None
                break
        else:
            groups.append((way, {id_: None}, {engine: None}))
    return tuple(
        Way(tuple(ids), tuple(engines), n, pairs(protocol))
        for (protocol, n), ids, engines in groups
    )
