"""Print a recommendation: sentences and a table for people, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click

from quantkit.cli.console import print_json, print_table
from quantkit.ledger import Ledger
from quantkit.recommendation import Assessed, Check, Interval, Limit, Recommendation
from quantkit.reports.format import NOTHING, size, span
from quantkit.reports.prose import Prose, plain
from quantkit.reports.recommendation import WHOM, Advice, Pick, advice, picks


def recommendation(
    ledger: Ledger, found: Recommendation, profiles: Sequence[Recommendation], as_json: bool
) -> None:
    """What to ship, by each profile, the runner-up, what binds, what is open; then everything that
    was served."""
    said = advice(ledger, found)
    if as_json:
        picks_of = {one.profile: _candidate(one.pick) if one.pick else None for one in profiles}
        print_json({**_as_json(found, said), "profiles": picks_of})
        return
    click.echo(f"For {WHOM[found.profile]}: {plain(said.ship)}")
    for title, sentences in (
        ("", [said.why, said.numbers]),
        ("by profile", [_brief(one) for one in picks(profiles)]),
        ("runner-up", [said.runner_up]),
        ("limits", [said.limits, *said.binds]),
        ("undecided", said.undecided),
        ("excluded", said.excluded),
        ("not known", said.missing),
    ):
        for index, sentence in enumerate(filter(None, sentences)):
            click.echo(f"{'' if index else title:11}{plain(sentence)}")
    click.echo()
    _table(found)


def _brief(one: Pick) -> Prose:
    """``laptop: a on llamacpp (194 MB, 50.3 tokens/s with 1 request, 0.0774 nats)``."""
    numbers = ", ".join(filter(None, (one.memory, one.throughput, one.drift)))
    return (f"{one.profile}: ", *one.ship, f" ({numbers})" if numbers else "")


def _table(found: Recommendation) -> None:
    names = [limit.name for limit in found.limits]
    texts = any(one.candidate.worst_text for one in found.assessed)
    print_table(
        [
            "variant",
            "engine",
            f"tok/s @{found.concurrency}",
            "KLD, nats",
            *(["on text"] if texts else []),
            "memory",
            *names,
        ],
        (
            [
                one.candidate.row.id,
                one.candidate.engine,
                NOTHING if one.throughput is None else span(one.throughput),
                NOTHING if one.candidate.divergence is None else span(one.candidate.divergence),
                *([one.candidate.worst_text or NOTHING] if texts else []),
                size(round(one.candidate.memory.value)),
                *(check.state for check in one.checks),
            ]
            for one in found.assessed
        ),
    )


def _as_json(found: Recommendation, said: Advice) -> dict[str, Any]:
    """The same; numbers in full, in the units that their keys name or their limit has."""
    return {
        "profile": found.profile,
        "pick": _candidate(found.pick) if found.pick else None,
        "decided_by": found.choice.by if found.choice else None,
        "runner_up": _candidate(found.runner_up) if found.runner_up else None,
        "concurrency": found.concurrency,
        "drift": found.drift,
        "limits": [_limit(one) for one in found.limits],
        "binding": [
            {**_limit(one.before), "loosened_to": one.limit.bound, "pick": _candidate(one.pick)}
            for one in found.loosened
        ],
        "undecided": [plain(sentence) for sentence in said.undecided],
        "open": [_candidate(one) for one in found.open],
        "missing": [{"id": one.id, "reason": one.reason} for one in found.missing],
        "candidates": [_candidate(one) for one in found.assessed],
    }


def _candidate(one: Assessed) -> dict[str, Any]:
    row = one.candidate.row
    return {
        "variant": row.id,
        "engine": one.candidate.engine,
        "path": row.path,
        "output_tokens_per_s": _interval(one.throughput),
        "kld_mean": _interval(one.candidate.divergence),
        "kld_text": one.candidate.worst_text,
        "peak_rss_bytes": round(one.candidate.memory.value),
        "weight_bytes": row.bytes,
        "checks": [_check(check) for check in one.checks],
    }


def _limit(limit: Limit) -> dict[str, Any]:
    bound = {"at_least" if limit.at_least else "at_most": limit.bound}
    return {"limit": limit.name, "unit": limit.unit, **bound, "default": limit.is_default}


def _check(check: Check) -> dict[str, Any]:
    return {
        "limit": check.limit.name, "state": check.state, "measured": _interval(check.measured)
    }  # fmt: skip


def _interval(interval: Interval | None) -> dict[str, float | None] | None:
    """An end without a bound is null."""
    if interval is None:
        return None
    ends = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: end if math.isfinite(end) else None for name, end in ends.items()}
