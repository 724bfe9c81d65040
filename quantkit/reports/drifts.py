"""Drift in detail: each variant's verdict, where on the text it drifted, what it got wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.ledger import Ledger, Row
from quantkit.ledger.drift import ALPHA, Bin, Comparison, WorstPosition
from quantkit.reports import texts
from quantkit.reports.format import NOTHING, fixed, number, signed
from quantkit.reports.noise import against_reference, tiers
from quantkit.reports.prose import Name, Prose, listing
from quantkit.reports.table import accuracies, task_title

UNITS = {"percent": "%", "points": "points", "nats": "nats"}


@dataclass(frozen=True)
class Verdicts:
    """One measure: a line a variant, and what the lines do not say."""

    title: str
    items: str
    """What was paired: ``80 windows``."""
    tolerance: str
    stopped: bool
    """Whether each line has its own number of questions."""
    flips: bool
    undecided: bool
    """Whether any line is."""
    lines: tuple[Line, ...]
    groups: Prose
    subjects: Prose


@dataclass(frozen=True)
class Line:
    """One variant against the reference, in words."""

    id: str
    drift: str
    interval: str
    p: str
    verdict: str
    asked: str
    more: str
    flips: tuple[int, int, int] | None


@dataclass(frozen=True)
class Profiles:
    """Mean divergence on one text by the kind of position: titles of the columns, and a row a
    variant."""

    text: str
    title: str
    """The text's, where there are several; else empty."""
    positions: tuple[str, ...]
    confidences: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def verdicts(ledger: Ledger) -> list[Verdicts]:
    """Perplexity on each text first, then every accuracy; none where nothing was compared."""
    found = [_verdicts(ledger, "ppl", text) for text in texts.names(ledger)]
    found += [_verdicts(ledger, name, None) for name in accuracies(ledger)]
    return [one for one in found if one]


def said(comparison: Comparison) -> str:
    """``+2.57 %``, ``+0.7 points``."""
    return f"{signed(comparison.drift, _places(comparison))} {UNITS[comparison.unit]}"


def _places(comparison: Comparison) -> int:
    return 2 if comparison.unit == "percent" and abs(comparison.drift) < 10 else 1


def interval(comparison: Comparison) -> str:
    """``+1.2 to +3.4``, of 95 %."""
    if comparison.low is None or comparison.high is None:
        return NOTHING
    places = _places(comparison)
    return f"{signed(comparison.low, places)} to {signed(comparison.high, places)}"


def p_value(comparison: Comparison) -> str:
    """The adjusted p-value of no difference."""
    return "< 0.001" if comparison.p_adjusted < 0.001 else fixed(comparison.p_adjusted, 3)


def asked(comparison: Comparison) -> str:
    """``282``; ``96 of 282`` where no more were needed."""
    of = "" if comparison.of is None else f" of {comparison.of:,}"
    return f"{comparison.n:,}{of}"


def pairs(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Every pair of one measure, at least one: titles of the columns, and a row a later member.

    The drift is from the first of all; then stands the verdict against each that comes before.
    """
    first = comparisons[0]
    found = {(one.a, one.b): one for one in comparisons}
    earlier = list(dict.fromkeys(one.a for one in comparisons))
    later = list(dict.fromkeys(one.b for one in comparisons))
    tolerance = "" if first.tolerance is None else f" ±{first.tolerance:g} {UNITS[first.unit]}"
    items = "questions" if first.flips else "windows"
    measure = first.measure if first.text is None else f"{first.measure} on {first.text}"
    titles = [measure + tolerance, f"drift from {first.a}", "95 % interval", "p", items]
    rows = []
    for id_ in later:
        one = found[first.a, id_]
        verdicts = [_verdict(found[a, id_]) if (a, id_) in found else "" for a in earlier]
        rows.append([id_, said(one), interval(one), p_value(one), asked(one), *verdicts])
    return [*titles, *(f"against {a}" for a in earlier)], rows


def _verdict(one: Comparison) -> str:
    """``undecided (3,400 more)``: how many windows or questions would decide."""
    if one.verdict != "undecided":
        return one.verdict
    return f"undecided ({roughly(one.more)} more)" if one.more else "undecided (out of reach)"


def more(comparison: Comparison) -> str:
    """What would decide what is undecided."""
    items = "windows" if comparison.flips is None else "questions"
    if comparison.verdict != "undecided":
        return ""
    if comparison.more is None:
        return f"no number of {items} in reach"
    if comparison.more == 1:
        return f"one more {items[:-1]}"
    return f"some {roughly(comparison.more)} more {items}"


def roughly(count: int) -> str:
    """An estimate of how many, rounded up to two digits: ``3,400``."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return f"{-(-count // unit) * unit:,}"


def profiles(ledger: Ledger) -> list[Profiles]:
    """One a text, of those on which variants have profiles that were cut in the same way."""
    found = [_profiles(ledger, text) for text in texts.names(ledger)]
    return [one for one in found if one]


def _profiles(ledger: Ledger, text: str) -> Profiles | None:
    rows = [
        (row.id, profile)
        for row in ledger.variants
        if text in row.texts and (profile := row.texts[text].profile)
    ]
    cuts = {
        tuple((one.low, one.high) for one in profile.by_position + profile.by_confidence)
        for _, profile in rows
    }
    if len(cuts) != 1:
        return None
    first = rows[0][1]
    return Profiles(
        text,
        texts.title(ledger, text) if texts.several(ledger) else "",
        tuple(f"{one.low:.0f} to {one.high:.0f}" for one in first.by_position),
        tuple(f"{100 * one.low:.0f} to {100 * one.high:.0f} %" for one in first.by_confidence),
        tuple(
            (id_, tuple(map(_mean, profile.by_position + profile.by_confidence)))
            for id_, profile in rows
        ),
    )


def worst(row: Row, text: str) -> list[WorstPosition]:
    """Where on a text the variant strayed farthest, with its line breaks made visible."""
    profile = row.texts[text].profile if text in row.texts else None
    return [
        place.model_copy(
            update={
                name: getattr(place, name).replace("\n", "↵")
                for name in ("before", "true", "reference_top", "top")
            }
        )
        for place in (profile.worst if profile else [])
    ]


def _verdicts(ledger: Ledger, name: str, text: str | None) -> Verdicts | None:
    found = [
        comparison
        for row in ledger.variants[1:]
        if (comparison := against_reference(ledger, row, name, text))
    ]
    if not found:
        return None
    flips = any(one.flips for one in found)
    first = found[0]
    items = f"{first.n:,} {'questions' if flips else 'windows'}"
    if first.of is not None:
        items = f"up to {first.of:,} questions in random order until decided"
    return Verdicts(
        title=task_title(name) if text is None else f"Perplexity{texts.on(ledger, text)}",
        items=items,
        tolerance=f"{first.tolerance:g} {UNITS[first.unit]}",
        stopped=first.of is not None,
        flips=flips,
        undecided=any(one.verdict == "undecided" for one in found),
        lines=tuple(map(_line, found)),
        groups=_groups(ledger, name, text),
        subjects=_subjects(found),
    )


def _line(one: Comparison) -> Line:
    changed = one.flips
    return Line(
        one.b,
        said(one),
        interval(one),
        p_value(one),
        one.verdict,
        asked(one),
        more(one),
        (changed.right_to_wrong, changed.wrong_to_right, changed.wrong_to_other)
        if changed
        else None,
    )


def _groups(ledger: Ledger, name: str, text: str | None) -> Prose:
    """Who can be told from whom, from the lowest value up."""
    groups = tiers(ledger, name, text)
    if len(groups) == 1:
        return ("The data tell none of them from another, the reference included.",)
    said: Prose = ("The data tell these groups apart, from the lowest value up: ",)
    for index, group in enumerate(groups):
        said += ("; " if index else "", *listing(group))
    return (*said, ". Nothing is ranked inside a group.")


def _subjects(found: list[Comparison]) -> Prose:
    """Which subjects changed beyond chance."""
    counts = [one.subjects for one in found if one.subjects and one.subjects > 1]
    if not counts:
        return ()
    text: Prose = ()
    for one in found:
        for subject in one.changed_subjects:
            if subject.p_adjusted <= ALPHA:
                text += ("; " if text else "", Name(one.b), " in ", Name(subject.subject))
                text += (
                    f" ({subject.right_to_wrong} of {subject.n} lost, "
                    f"{subject.wrong_to_right} won)",
                )
    if not text:
        return (
            f"In none of the {counts[0]} subjects, tested separately, is the change beyond "
            "chance (Holm over the subjects).",
        )
    return (f"Beyond chance among {counts[0]} subjects (Holm over the subjects): ", *text, ".")


def _mean(one: Bin) -> str:
    return number(one.kld_mean, 2)
