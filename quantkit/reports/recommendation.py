"""The recommendation in words: what to ship, what the next one would cost, what stays open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.ledger import REFERENCE, Ledger
from quantkit.recommendation import (
    ACCEPTED,
    Assessed,
    Candidate,
    Check,
    Interval,
    Limit,
    Loosened,
    Profile,
    Recommendation,
    said,
)
from quantkit.reports.format import milliseconds, number, signed, size, span
from quantkit.reports.prose import Name, Prose

RULE = (
    "The rule: among all quantized variants, on every engine that served them, only those that "
    "meet every limit beyond the noise are considered. The profile's first criterion decides; "
    "where the data cannot tell variants apart by it, the next one does. The reference is "
    "recommended only if no quantized variant meets the limits. With several texts, each variant "
    "is judged by the one on which it drifted most."
)
WHOM: dict[Profile, str] = {"laptop": "a laptop", "server": "a server", "quality": "quality"}
_RULES: dict[Profile, tuple[str, str]] = {
    "laptop": ("the least memory", "the most tokens per second with one request at a time"),
    "server": ("the most tokens per second with the most requests at a time", "the least memory"),
    "quality": (
        "the least drift, where all that are equivalent to the reference count as equal",
        "the least memory",
    ),
}
"""What comes first, and what then."""
_BY_GOODPUT = (
    "the most goodput at the objective",
    "the most tokens per second, and the least memory",
)
"""For a server, where the run searched for it."""
NOTHING_FITS: Prose = ("Nothing can be recommended: no variant is known to meet every limit.",)


@dataclass(frozen=True)
class Advice:
    """The recommendation, a sentence or two for each question; empty where there is no answer."""

    ship: Prose
    numbers: Prose
    why: Prose
    runner_up: Prose
    limits: Prose
    binds: list[Prose]
    undecided: list[Prose]
    excluded: list[Prose]
    """A line for each that fails a limit: which, and by how much."""
    missing: list[Prose]


def advice(ledger: Ledger, found: Recommendation) -> Advice:
    """What a recommendation says."""
    pick = found.pick
    return Advice(
        ship=_ship(found),
        numbers=(*_numbers(ledger, pick, found.concurrency), ".") if pick else (),
        why=_why(found),
        runner_up=_runner_up(found),
        limits=_limits(found),
        binds=_binds(found),
        undecided=_undecided(ledger, found),
        excluded=[_excluded(one) for one in found.assessed if _failed(one)],
        missing=[(Name(one.id), f" {one.reason}.") for one in found.missing],
    )


def _ship(found: Recommendation) -> Prose:
    choice = found.choice
    if choice is None:
        return NOTHING_FITS
    if choice.quantized:
        return "Ship ", *on_engine(choice.pick.candidate), "."
    any_made = any(one.candidate.quantized for one in found.assessed)
    return (
        "Ship ",
        *on_engine(choice.pick.candidate),
        ": no quantized variant is known to be within the limits."
        if any_made
        else ": no quantized variant was benched.",
    )


def on_engine(candidate: Candidate) -> Prose:
    """``gguf-Q8_0 on llamacpp``, with the name set as one."""
    return Name(candidate.row.id), f" on {candidate.engine}"


def listing(ones: Sequence[Candidate]) -> Prose:
    """``a on llamacpp, b on llamacpp and c on vllm``."""
    text: Prose = ()
    for index, one in enumerate(ones):
        last = index == len(ones) - 1
        text += ((" and " if last else ", ") if index else "", *on_engine(one))
    return text


def _numbers(ledger: Ledger, one: Assessed, concurrency: int) -> Prose:
    candidate = one.candidate
    requests = "request" if concurrency == 1 else "requests"
    parts = []
    if one.throughput:
        parts.append(
            f"{span(one.throughput)} output tokens/s with {concurrency} {requests} at a time"
        )
    if candidate.divergence:
        parts.append(f"KL divergence {span(candidate.divergence)} nats{_on(candidate)}")
    if perplexity := _perplexity(ledger, candidate.row.id):
        parts.append(perplexity)
    parts += [
        f"{check.said} {_span(check)}"
        for check in one.checks
        if check.measured and check.limit.name not in ("max-kld", "max-memory")
    ]
    if all(check.limit.name != "min-goodput" for check in one.checks):
        parts += [
            f"goodput {number(good.rate_per_s)} requests/s at {said(good.slo)}"
            for good in candidate.goodputs
        ]
    weights = candidate.row.bytes
    of_weights = f", {size(weights)} of it weights" if weights else ""
    if weights and ledger.reference.bytes and candidate.quantized:
        share = number(100 * weights / ledger.reference.bytes, 2)
        of_weights += f" ({share} % of the reference's {size(ledger.reference.bytes)})"
    parts.append(f"{size(round(candidate.memory.value))} of memory at peak{of_weights}")
    return ("; ".join(parts),)


def _perplexity(ledger: Ledger, id_: str) -> str | None:
    """How much higher it is than the reference's, on the text where it rose most."""
    pairs = [one for one in ledger.comparisons
             if (one.measure, one.a, one.b) == ("ppl", REFERENCE, id_)]  # fmt: skip
    if not pairs:
        return None
    worst = max(pairs, key=lambda one: one.drift)
    on = f" on {worst.text}" if len(pairs) > 1 else ""
    return f"perplexity {signed(worst.drift, 1)} %{on}"


def _why(found: Recommendation) -> Prose:
    choice = found.choice
    if choice is None:
        return ()
    if choice.by == "only":
        others = "It alone" if choice.quantized else "Of the others it alone"
        return (f"{others} is known to meet every limit." if found.limits else "It stands alone.",)
    reason = {
        "memory": "it takes the least memory",
        "throughput": "it is the fastest, beyond the noise",
        "goodput": "it serves the most requests within the objective",
        "drift": "it is the nearest to the reference",
        "nothing": "it has the highest median throughput, and nothing else decides",
    }[choice.by]
    if not choice.before:
        return (f"Of those within {_within(found)} {reason}.",)
    alike = " and ".join(choice.before)
    return (
        f"In {alike} it cannot be told from ",
        *listing([one.candidate for one in choice.tied]),
        f"; of these {reason}.",
    )


def _within(found: Recommendation) -> str:
    """``the limit (KL divergence at most 0.0953 nats, which is 10 % more perplexity)``."""
    if len(found.limits) != 1:
        return "the limits"
    (limit,) = found.limits
    because = f", which is {limit.because}" if limit.because else ""
    return f"the limit ({limit.said} {bound(limit)}{because})"


def _runner_up(found: Recommendation) -> Prose:
    """What the second would give and take, in throughput, drift and memory."""
    pick, second = found.pick, found.runner_up
    if second is None:
        return ("No other is known to meet every limit.",) if pick else ()
    if pick is None or pick.throughput is None or second.throughput is None:
        return ()
    a, b = pick.candidate, second.candidate
    text: Prose = (*on_engine(b), ": ", _change(second.throughput, pick.throughput), "; ")
    if a.row.id == b.row.id:
        text += ("the same weights; ",)
    elif a.divergence and b.divergence:
        text += (
            f"KL divergence {number(b.divergence.value)}{_on(b, ' nats')} instead of "
            f"{number(a.divergence.value)} nats{_on(a)} ({_nearer(found, a, b)}); ",
        )
    there, here = (round(one.memory.value) for one in (b, a))
    return (*text, f"{size(there)} of memory instead of {size(here)}.")


def _change(one: Interval, other: Interval) -> str:
    """``131 instead of 118 tokens/s (+11 %, -2 to +26 %: not told apart)``."""
    ratio = one.over(other)
    ends = [signed(100 * (end - 1), 0) for end in (ratio.value, ratio.low, ratio.high)]
    told = ": not told apart" if one.overlaps(other) else ""
    return (
        f"{number(one.value)} instead of {number(other.value)} tokens/s "
        f"({ends[0]} %, {ends[1]} to {ends[2]} %{told})"
    )


def _nearer(found: Recommendation, a: Candidate, b: Candidate) -> str:
    if found.nearness.nearer(b.row, a.row):
        return "nearer to the reference"
    nearer = found.nearness.nearer(a.row, b.row)
    return "farther from the reference" if nearer else "not told apart"


def _on(candidate: Candidate, unit: str = "") -> str:
    """``on stdlib:code``, after the unit; nothing where it goes without saying."""
    return f"{unit} on {candidate.worst_text}" if candidate.worst_text else ""


def _limits(found: Recommendation) -> Prose:
    """What was asked for."""
    said = [
        f"{one.said} {bound(one)}" + (f" (the default: {one.because})" if one.is_default else "")
        for one in found.limits
    ]
    return (f"{'; '.join(said)}." if said else "none.",)


def _binds(found: Recommendation) -> list[Prose]:
    """Each limit whose change alone changes the pick, the smallest change first."""
    if not found.limits:
        return []
    if not found.loosened:
        return [("Loosening any one limit alone would change nothing.",)]
    return [_bind(one) for one in found.loosened]


def _bind(one: Loosened) -> Prose:
    verb = "lowered" if one.limit.at_least else "raised"
    text: Prose = (
        Name(one.limit.name),
        f" {verb} from {value(one.limit, one.before.bound)} to "
        f"{value(one.limit, one.limit.bound)} ({_far(one)}) would make it ",
        *on_engine(one.pick.candidate),
    )
    if one.pick.throughput:
        text += (f" with {number(one.pick.throughput.value)} tokens/s",)
    return (*text, ".")


def _far(one: Loosened) -> str:
    """``+46 %``, ``12 times as much``."""
    times = one.limit.bound / one.before.bound if one.before.bound else math.inf
    if times > 2:
        return f"{number(times, 2)} times as much" if math.isfinite(times) else "from nothing"
    return f"{signed(100 * (times - 1), 0 if abs(times - 1) >= 0.1 else 1)} %"


def _undecided(ledger: Ledger, found: Recommendation) -> list[Prose]:
    """What would have to be measured longer to be known."""
    text: list[Prose] = []
    for one in found.assessed:
        parts: Prose = ()
        for check in one.open:
            parts += ("; " if parts else "", f"{check.said} {_span(check)}, ")
            parts += (f"{bound(check.limit)}",)
        if parts:
            end = "; if it does, it is the one to ship." if one in found.open else "."
            text.append(("Whether ", *on_engine(one.candidate), " meets the limit: ", *parts, end))
    client_bound = [
        one.candidate
        for one in found.assessed
        if not _failed(one)
        and (bench := one.candidate.bench(found.concurrency))
        and bench.client_bound
    ]
    if client_bound:
        text.append(
            (
                "The true speed of ",
                *listing(client_bound),
                ": the load generator was the bottleneck.",
            )
        )
    if ledger.environment.gpu:
        text.append(("How much memory is used on the GPU: only the host's was measured.",))
    return text


def _failed(one: Assessed) -> list[Check]:
    return [check for check in one.checks if check.state == "excluded"]


def _excluded(one: Assessed) -> Prose:
    """``memory 2.31 GB, 1.31 GB above 1.00 GB``."""
    text: Prose = (*on_engine(one.candidate), ": ")
    for index, check in enumerate(_failed(one)):
        assert check.measured is not None
        limit = check.limit
        gap = value(limit, abs(check.measured.value - limit.bound))
        text += ("; " if index else "", f"{check.said} {_span(check)}, {gap} ")
        text += (f"{'below' if limit.at_least else 'above'} {value(limit, limit.bound)}",)
    return (*text, ".")


def _span(check: Check) -> str:
    """``0.0241 nats (0.0233 to 0.0249)``."""
    limit, interval = check.limit, check.measured
    assert interval is not None
    if interval.low == interval.high:
        return value(limit, interval.value)
    if math.isinf(interval.high):
        return f"{value(limit, interval.value)} or more"
    ends = [value(limit, end).removesuffix(f" {limit.unit}") for end in
            (interval.low, interval.high)]  # fmt: skip
    return f"{value(limit, interval.value)} ({' to '.join(ends)})"


def bound(limit: Limit) -> str:
    """``at most 6.44 GB``."""
    return f"{'at least' if limit.at_least else 'at most'} {value(limit, limit.bound)}"


def value(limit: Limit, measured: float) -> str:
    """In the limit's unit."""
    if limit.unit == "bytes":
        return size(round(measured))
    if limit.unit == "ms":
        return milliseconds(measured)
    if limit.unit == "points":
        return f"{number(measured)} points"
    return f"{number(measured)} {limit.unit}"


@dataclass(frozen=True)
class Pick:
    """What one profile recommends, as a row of a small table; a cell is empty where it has none."""

    profile: Profile
    title: str
    first: str
    """What the profile puts first."""
    rule: str
    """That, what comes then, and what may be lost."""
    ship: Prose
    memory: str
    throughput: str
    drift: str
    why: Prose


def picks(found: Sequence[Recommendation]) -> list[Pick]:
    """A row for each profile."""
    rows = []
    for one in found:
        first, then = _RULES[one.profile]
        if one.profile == "server" and any(other.goodput for other in one.assessed):
            first, then = _BY_GOODPUT
        accepted = f"up to {ACCEPTED[one.profile]:g} times the tolerance in perplexity"
        pick = one.pick
        requests = "request" if one.concurrency == 1 else "requests"
        rows.append(
            Pick(
                one.profile,
                WHOM[one.profile],
                first,
                f"{first}; then {then}; {accepted}",
                on_engine(pick.candidate) if pick else ("nothing",),
                size(round(pick.candidate.memory.value)) if pick else "",
                f"{number(pick.throughput.value)} tokens/s with {one.concurrency} {requests}"
                if pick and pick.throughput
                else "",
                f"{number(drift.value)} nats"
                if pick and (drift := pick.candidate.divergence)
                else "",
                _why(one) if pick else NOTHING_FITS,
            )
        )
    return rows
