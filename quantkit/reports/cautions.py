"""Where the numbers must be read with care, as far as the ledger itself can tell."""

from __future__ import annotations

import math

from quantkit.ledger import Ledger
from quantkit.recommendation.interval import ONE_RUN, ONE_START
from quantkit.reports import texts
from quantkit.reports.noise import Served, against_floor
from quantkit.reports.prose import Name, Prose, listing
from quantkit.reports.table import concurrencies, served


def cautions(ledger: Ledger) -> list[Prose]:
    """One sentence or two each; what the source's weights are is not here but shown by itself."""
    return [
        *_broken(ledger),
        *_incomplete(ledger),
        *_other_protocol(ledger),
        *_other_engine(ledger),
        *_noise_floor(ledger),
        *_same_dataset(ledger),
        *_bench(ledger),
        *_verdicts(ledger),
    ]


def _verdicts(ledger: Ledger) -> list[Prose]:
    """What a verdict promises, and what not."""
    if not ledger.comparisons:
        return []
    return [
        (
            "Verdicts come from paired tests on the same windows of text and the same questions "
            "for all. Over all pairs of one measure together, at most 5 % of such reports call "
            "something different that is not, and at most 5 % something equivalent that is not "
            "(Holm). “Undecided” means "
            "that these data cannot tell, not that nothing changed. Other texts and questions may "
            "say otherwise. The ± of single values treats tokens as independent, which those of "
            "one text are not quite.",
        )
    ]


def _broken(ledger: Ledger) -> list[Prose]:
    """Values that are not numbers are shown as such and take no part in anything."""
    found = [
        f"{row.id}: {_named(name, text, ledger)}"
        for row in ledger.variants
        for text, name, metric in row.all_metrics
        if not math.isfinite(metric.value)
    ]
    values = listing(found)
    return [("Not finite, so left out of every comparison: ", *values, ".")] if found else []


def _incomplete(ledger: Ledger) -> list[Prose]:
    """Rows that did not fail and still lack what most others have."""
    wanted = {(text, name) for row in ledger.variants[1:] for text, name, _ in row.all_metrics}
    loads = set(concurrencies(ledger))
    found = [
        row.id
        for row in ledger.variants[1:]
        if not row.failed
        and (
            wanted - {(text, name) for text, name, _ in row.all_metrics}
            or loads - {bench.concurrency for bench in row.bench}
        )
    ]
    return [("Not everything was measured for ", *listing(found), ".")] if found else []


def _other_protocol(ledger: Ledger) -> list[Prose]:
    """Two results whose protocols differ are never compared: the table shows no drift then."""
    found = []
    for row in ledger.variants[1:]:
        for text, name, metric in row.all_metrics:
            there = ledger.reference.metric(name, text)
            if there is not None and there.protocol != metric.protocol:
                found.append(f"{row.id}: {_named(name, text, ledger)}")
    if not found:
        return []
    return [
        (
            "Measured by another protocol than the reference, so not compared with it: ",
            *listing(found),
            ".",
        )
    ]


def _other_engine(ledger: Ledger) -> list[Prose]:
    """A drift across engines is not the weights' alone."""
    own = next(iter(ledger.reference.by_text("ppl").values()), None)
    found = [
        row.id
        for row in ledger.variants[1:]
        if own and any(one.engine != own.engine for one in row.by_text("kld_mean").values())
    ]
    if own is None or not found:
        return []
    return [
        (
            "The reference was scored by ",
            Name(str(own.engine)),
            ", another engine than that of ",
            *listing(found),
            "; their drift includes whatever the engines differ in.",
        )
    ]


def _noise_floor(ledger: Ledger) -> list[Prose]:
    """Drifts that the engine, or the size of its batches, causes alone."""
    found = [
        f"{row.id}: {name}"
        for row in ledger.variants[1:]
        if (floor := against_floor(ledger, row))
        for name in floor.below
    ]
    if not found:
        return []
    return [
        (
            "Below the noise floor, the change that the serving engine or another batch size alone "
            "makes to the unquantized model, and so no evidence of a loss by quantization: ",
            *listing(found),
            ".",
        )
    ]


def _same_dataset(ledger: Ledger) -> list[Prose]:
    """Calibration on the kind of text that is evaluated favours the calibrated variants."""
    alike, calibration = texts.calibration_shares(ledger), ledger.calibration
    if not alike or calibration is None:
        return []
    if not texts.several(ledger) and not calibration.kinds:
        return [
            (
                "Calibration and evaluation text are different parts of one dataset, so they are "
                "of one kind. That favours calibrated variants; on other text they may "
                "drift more.",
            )
        ]
    if not texts.several(ledger):
        (share,) = alike.values()
        return [
            (
                f"{round(share * calibration.samples)} of {calibration.samples} calibration "
                "samples are from the evaluation text's own dataset. That favours calibrated "
                "variants; on text unlike all calibration samples they may drift more.",
            )
        ]
    counts = [f"{round(share * calibration.samples)} of {name}'s" for name, share in alike.items()]
    others = [name for name in texts.names(ledger) if name not in alike]
    said: Prose = (
        f"Among the {calibration.samples} calibration samples are ",
        " and ".join(counts),
        " own dataset, though from other parts of it. That favours calibrated variants",
    )
    if others:
        return [(*said, "; the drift on ", *listing(others), " is not affected.")]
    return [(*said, "; on text unlike all calibration samples they may drift more.")]


def _named(name: str, text: str | None, ledger: Ledger) -> str:
    return f"{name} on {text}" if text is not None and texts.several(ledger) else name


def _bench(ledger: Ledger) -> list[Prose]:
    found = [one for load in concurrencies(ledger) for one in served(ledger, load)]
    if not found:
        return []
    least = min(one.bench.requests for one in found)
    most = max(one.bench.requests for one in found)
    counts = f"{least}" if least == most else f"{least} to {most}"
    said: list[Prose] = [
        (f"Each throughput is from {counts} requests on this machine. ", _noise(found))
    ]
    if len({one.engine for one in found}) > 1:
        said.append(
            (
                "Throughputs on different engines compare engine and format together: a variant "
                "can be faster because of the engine that serves it.",
            )
        )
    changed: dict[str, dict[str, None]] = {}
    for one in found:
        for change in one.bench.changes:
            changed.setdefault(change, {})[one.row.id] = None
    if changed:
        text: Prose = ("Not all load was measured as the recipe asks. ",)
        for change, ids in changed.items():
            text += (change[0].upper() + change[1:], ": ", *listing(list(ids)), ". ")
        said.append(text)
    bound = list(dict.fromkeys(one.row.id for one in found if one.bench.client_bound))
    if bound:
        said.append(
            (
                "The load generator was the bottleneck in some loads of ",
                *listing(bound),
                "; there the engine may be faster than is shown.",
            )
        )
    failed = list(dict.fromkeys(one.row.id for one in found if one.bench.errors))
    if failed:
        said.append(
            (
                "Some requests failed in the bench of ",
                *listing(failed),
                "; its throughput and latencies are those of the completed ones.",
            )
        )
    return said


def _noise(found: list[Served]) -> str:
    """What the intervals of throughputs are worth."""
    fewest = min(len(one.bench.repetitions) for one in found)
    if fewest < 3:
        return (
            f"With fewer than three repetitions the error is unknown: differences below "
            f"{100 * ONE_RUN:.0f} % are not ranked."
        )
    return (
        f"Intervals are over {fewest} repetitions or more, which share one start of the server and "
        "one hour of the machine, and are no narrower than "
        f"{50 * ONE_START:.0f} % to each side; throughputs whose intervals overlap are not ranked."
    )
