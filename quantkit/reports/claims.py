"""What people say of engines and of int4, checked for this machine and this model.

Nobody's figure but one's own says how many times faster vLLM is than llama.cpp: it depends on the
concurrency more than on anything else. A ratio's interval holds whatever both throughputs may be
in theirs, so 1 lies outside exactly where the two can be told apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

from quantkit.ledger import REFERENCE, Ledger, is_accuracy
from quantkit.recommendation import Candidate, Interval, candidates
from quantkit.reports.drifts import interval as interval_of
from quantkit.reports.drifts import said
from quantkit.reports.format import NOTHING, fixed, number, size, span
from quantkit.reports.noise import against_reference
from quantkit.reports.panels import Measure, Panels, Reading, lay_out
from quantkit.reports.prose import Prose
from quantkit.reports.scales import logarithmic
from quantkit.reports.table import Cell, concurrencies, shown, task_title

_SPELLED = {"vllm": "vLLM", "llamacpp": "llama.cpp"}
"""Engines as they spell themselves."""
_FOUR_BITS = re.compile(r"[\w-]+:w4g.*|gguf:(Q4_|IQ4_).*", re.IGNORECASE)


@dataclass(frozen=True)
class Race:
    """One engine against another: whom they served, and the ratio at each concurrency."""

    title: str
    engines: tuple[str, str]
    """The names that sentences use."""
    subtitle: str
    ratios: list[tuple[int, Interval, Candidate, Candidate]]
    says: Prose
    caveat: str


@dataclass(frozen=True)
class Int4:
    """A 4-bit variant against the unquantized model on the same engine, in words."""

    id: str
    engine: str
    base: str
    """The id of what it is compared with; a dash where the engine served nothing unquantized."""
    cells: list[Cell]
    """Throughput at each of the concurrencies shown, weights, memory, drift, accuracies."""


@dataclass(frozen=True)
class Claims:
    """All that was checked."""

    races: list[Race]
    chart: Panels | None
    levels: list[int]
    """Concurrencies of ``Int4``."""
    tasks: list[str]
    int4: list[Int4]


def claims(ledger: Ledger) -> Claims | None:
    """None where neither two engines nor a 4-bit variant beside the reference were benched."""
    served = candidates(ledger)
    levels = concurrencies(ledger)
    pairs = combinations(sorted({one.engine for one in served}, reverse=True), 2)
    found = chain.from_iterable(_races(served, pair, levels) for pair in pairs)
    races = [race for race in found if race.ratios]
    few = shown(levels)
    tasks = sorted({name for row in ledger.variants for name in row.metrics if is_accuracy(name)})
    int4 = [_int4(ledger, one, served, few, tasks) for one in served
            if _FOUR_BITS.fullmatch(one.row.spec)]  # fmt: skip
    if not races and not int4:
        return None
    return Claims(races, _chart(races), few, [task_title(name) for name in tasks], int4)


def _races(
    served: Sequence[Candidate], engines: tuple[str, str], levels: Sequence[int]
) -> list[Race]:
    """Two engines compared: on the reference, on what both served, and by the fastest variant of
    each."""
    first, second = ([one for one in served if one.engine == name] for name in engines)
    both = [(a, b) for a in first for b in second if a.row.id == b.row.id]
    reference = [_fastest(_unquantized(ones), levels) for ones in (first, second)]
    races = []
    if reference[0] and reference[1]:
        races.append(
            _race(
                "The reference, unquantized", engines, [(reference[0], reference[1])], levels,
                "The weights are the same; their formats and the engines' arithmetic are not.",
            )
        )  # fmt: skip
    races += [
        _race(
            a.row.id, engines, [(a, b)], levels,
            "One file on both engines: kernels and scheduling differ, the weights do not.",
        )
        for a, b in both
    ]  # fmt: skip
    races.append(
        _race(
            "The fastest variant of each", engines, [(a, b) for a in first for b in second],
            levels,
            "The formats differ, and with them size and drift: this compares what each engine can "
            "be given, not the engines alone.",
        )
    )  # fmt: skip
    return races


def _unquantized(ones: Sequence[Candidate]) -> list[Candidate]:
    return [one for one in ones if not one.quantized]


def _fastest(ones: Sequence[Candidate], levels: Sequence[int]) -> Candidate | None:
    """The fastest, each judged at the highest concurrency at which it was benched."""
    if not ones:
        return None
    return max(ones, key=lambda one: max(_rate(one, level) for level in levels))


def _rate(one: Candidate, level: int) -> float:
    here = _at(one, level)
    return here.value if here else 0.0


def _at(one: Candidate, level: int) -> Interval | None:
    """What was measured at this very concurrency."""
    if all(bench.concurrency != level for bench in one.benches):
        return None
    return one.throughput(level)


def _race(
    title: str,
    engines: tuple[str, str],
    pairs: Sequence[tuple[Candidate, Candidate]],
    levels: Sequence[int],
    caveat: str,
) -> Race:
    """At each level the fastest of the first against the fastest of the second members."""
    ratios = []
    for level in levels:
        known = [(a, b) for a, b in pairs if _at(a, level) and _at(b, level)]
        if not known:
            continue
        a = max((a for a, _ in known), key=lambda one: _rate(one, level))
        b = max((b for _, b in known), key=lambda one: _rate(one, level))
        one, other = _at(a, level), _at(b, level)
        if one and other and other.value > 0:
            ratios.append((level, one.over(other), a, b))
    single = {(a.key, b.key) for _, _, a, b in ratios}
    subtitle = ""
    if len(single) == 1:
        _, _, a, b = ratios[0]
        subtitle = f"{a.row.id} ÷ {b.row.id}" if a.row.id != b.row.id else ""
    names = spelled(engines[0]), spelled(engines[1])
    return Race(title, names, subtitle, ratios, _says(ratios, names), caveat)


def spelled(engine: str) -> str:
    """``vLLM``, ``llama.cpp (kv_cache=q8_0)``."""
    name, space, options = engine.partition(" ")
    return f"{_SPELLED.get(name, name)}{space}{options}"


def _says(
    ratios: Sequence[tuple[int, Interval, Candidate, Candidate]], names: tuple[str, str]
) -> Prose:
    """``At 1 request … 0.83 (0.80 to 0.86) times as fast; …``, at three concurrencies."""
    if not ratios:
        return ()
    few = shown([level for level, *_ in ratios])
    text: Prose = (f"{names[0]} is ",)
    for index, (level, ratio, *_) in enumerate(one for one in ratios if one[0] in few):
        text += (", " if index else "", f"{span(ratio, _times)} times as fast as {names[1]}"
                 if not index else span(ratio, _times), f" with {level}")  # fmt: skip
        text += (" request at a time" if level == 1 else " at a time",) if not index else ()
    ahead = [level for level, ratio, *_ in ratios if ratio.low > 1]
    behind = [level for level, ratio, *_ in ratios if ratio.high < 1]
    if ahead and behind and min(ahead) > max(behind):
        between = f"between {max(behind)} and {min(ahead)} requests at a time"
        text += (f"; the lead changes {between}",)
    even = [level for level, ratio, *_ in ratios if ratio.low <= 1 <= ratio.high]
    if even:
        text += (f"; with {_numbers(even)} the two cannot be told apart",)
    held = [level for level, _, a, b in ratios
            if any(bench.client_bound for it in (a, b) if (bench := it.bench(level)))]  # fmt: skip
    if held:
        text += (f"; with {_numbers(held)} the load generator was the bottleneck",)
    return (*text, ".")


def _numbers(levels: Sequence[int]) -> str:
    texts = [str(level) for level in levels]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _chart(races: Sequence[Race]) -> Panels | None:
    levels = sorted({level for race in races for level, *_ in race.ratios})
    # One scale for all panels: they are to be compared.
    together = [1.0, *(end for race in races for _, ratio, *_ in race.ratios
                       for end in (ratio.low, ratio.high) if math.isfinite(end))]  # fmt: skip
    return lay_out(
        [("1 request" if level == 1 else f"{level} requests", "at a time") for level in levels],
        [
            Measure(
                race.title,
                (f"{race.engines[0]} ÷ {race.engines[1]}, log scale", race.subtitle),
                [[_reading(one) for one in race.ratios if one[0] == level] for level in levels],
                lambda _, left, right: logarithmic(together, left, right),
                line_at=1.0,
            )
            for race in races
        ],
        row_height=34.0,
        key=[("mean", 0, "times as fast, with its 95 % interval; the dashed line is a tie")],
        summary="How many times as fast one engine is as another at each concurrency, with 95 % "
        "intervals. The sentences below have the same numbers.",
    )


def _reading(one: tuple[int, Interval, Candidate, Candidate]) -> Reading:
    level, ratio, a, b = one
    words = [
        f"{span(ratio, _times)} times as fast, {level} at a time",
        *(f"{it.row.id} on {it.engine}: {number(_rate(it, level))} tokens/s" for it in (a, b)),
    ]
    return Reading("mean", ratio.value, "\n".join(words), (ratio.low, ratio.high), capped=True)


def _int4(
    ledger: Ledger,
    one: Candidate,
    served: Sequence[Candidate],
    levels: Sequence[int],
    tasks: Sequence[str],
) -> Int4:
    here = [other for other in _unquantized(served) if other.engine == one.engine]
    base = _fastest(here, levels)
    reference = next((row for row in ledger.variants if row.id == REFERENCE), None)
    compared = [against_reference(ledger, one.row, name) for name in tasks]
    return Int4(
        one.row.id,
        one.engine,
        base.row.id if base else NOTHING,
        [
            *(_against(one, base, level) for level in levels),
            _share(one.row.bytes, reference.bytes if reference else None),
            _share(one.memory.value, base.memory.value if base else None),
            _cell(one.divergence, number),
            *(Cell(said(c), interval_of(c)) if c else Cell(NOTHING) for c in compared),
        ],
    )


def _against(one: Candidate, base: Candidate | None, level: int) -> Cell:
    here, there = _at(one, level), _at(base, level) if base else None
    return _cell(here.over(there) if here and there else None, _times)


def _cell(interval: Interval | None, say: Callable[[float], str]) -> Cell:
    if interval is None:
        return Cell(NOTHING)
    return Cell(say(interval.value), f"{say(interval.low)} to {say(interval.high)}")


def _share(value: float | None, of: float | None) -> Cell:
    """``113 MB``, and ``42 %``."""
    text = NOTHING if value is None else size(round(value))
    return Cell(text, f"{100 * value / of:.0f} %" if of and value is not None else "")


def _times(ratio: float) -> str:
    return fixed(ratio, 2) if ratio < 10 else number(ratio)


def conclusion(found: Claims) -> Prose:
    """What none of this can say."""
    text: Prose = (
        "This does not show that the same holds for another model, prompt length, thread count, "
        "GPU or version. Each engine ran with the settings that Method shows.",
    )
    if all(one.base == NOTHING for one in found.int4) and found.int4:
        text += (" No engine of a 4-bit variant served the reference, so its gain is not known.",)
    return text
