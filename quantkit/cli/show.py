"""Print results: tables for people, JSON for programs, both on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantkit.cli.console import print_json, print_table, printable
from quantkit.ledger import REFERENCE, Ledger, Metric, OnText, Row

if TYPE_CHECKING:
    from quantkit.evaluation.compare import Compared
    from quantkit.evaluation.samples import Evaluated
    from quantkit.ledger.prompt_drift import PromptDrift
    from quantkit.models.variant import Manifest, Variant
    from quantkit.runs.pipeline import RunPlan
    from quantkit.toolchains import ToolchainStatus

_NOTABLE_GAIN = 0.01
_OF_TEXTS = ("ppl", "kld_mean", "top1_agreement")
_OVER_TEXTS = ("kld_mean, average", "worst", "on text", "its ppl")
_OTHERS = ("mmlu_acc", "prompts_exact_match")
"""Further columns, shown where the run has values for them."""


def ledger(result: Ledger, directory: Path, as_json: bool) -> None:
    """A run: one line a variant, what to ship, and where the report is."""
    from quantkit.recommendation import by_default, profiles
    from quantkit.reports.prose import plain
    from quantkit.reports.recommendation import picks

    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    levels = sorted({bench.concurrency for row in result.variants for bench in row.bench})
    several = len(result.texts) > 1
    others = [n for n in _OTHERS if any(n in row.metrics for row in result.variants)]
    columns = [
        "variant",
        "MB",
        "bits/weight",
        *(_OVER_TEXTS if several else _OF_TEXTS if result.texts else ()),
        *others,
        *(f"tok/s @{n}" for n in levels),
    ]
    texts = len(result.texts)
    print_table(columns, (_row_cells(row, texts, others, levels) for row in result.variants))
    for row in result.variants:
        if row.failed:
            click.echo(f"{row.id} failed in {row.failed.stage}: {row.failed.error}")
    if by_default(result):
        click.echo()
        for pick in picks(profiles(result)):
            click.echo(f"for {pick.title + ':':10} ship {plain(pick.ship)}")
    click.echo(f"\nreport: {(directory / 'report.html').absolute()}")


def plan(planned: RunPlan, as_json: bool) -> None:
    """What a run will make, and what it will measure as it is."""
    from quantkit.formats.merged import Merged

    brought = [
        {"id": entry.directory, "path": entry.path}
        | ({"error": problem} if (problem := planned.unusable.get(entry.directory)) else {})
        for entry in planned.brought
    ]
    if as_json:
        made = [
            {"id": one.spec.directory, **asdict(one), "spec": str(one.spec)}
            for one in planned.variants
        ]
        print_json([*made, *brought])
        return
    print_table(
        ["variant", "spec", "MB", "bits/weight", "calibrated"],
        (
            [
                variant.spec.directory,
                str(variant.spec),
                f"{variant.bytes / 1e6:.1f}",
                f"{variant.bits_per_weight:.2f}",
                "yes" if variant.needs_calibration else "no",
            ]
            for variant in planned.variants
        ),
    )
    for variant in planned.variants:
        for note in variant.notes:
            click.echo(f"{variant.spec.directory}: {note}")
    click.echo(f"{planned.bytes / 1e6:.1f} MB in all")
    if isinstance(planned.source, Merged):
        click.echo(f"{planned.source.bytes / 1e6:.1f} MB more for the merged source, which is kept")
    for entry in planned.brought:
        if entry.directory not in planned.unusable:
            click.echo(f"{entry.directory}: measured as it is, from {entry.path}")


def variants(made: Sequence[Variant], as_json: bool) -> None:
    """Variants that were just made."""
    if as_json:
        print_json(
            [
                {"id": v.id, "path": str(v.path), **v.manifest.model_dump(mode="json")}
                for v in made
                if v.manifest
            ]
        )
        return
    print_table(
        ["variant", "MB", "bits/weight", "quantized", "seconds", "peak MB"],
        (
            [
                str(v.path),
                f"{v.bytes / 1e6:.1f}",
                f"{v.manifest.bits_per_weight:.2f}",
                _number(v.manifest.bits_per_weight_quantized, ".2f"),
                f"{v.manifest.convert.seconds:.0f}",
                f"{v.manifest.convert.peak_rss_bytes / 1e6:.0f}",
            ]
            for v in made
            if v.manifest
        ),
    )
    for v in made:
        for note in v.manifest.notes if v.manifest else []:
            click.echo(f"{v.id}: {note}")
        for line in _conversion(v.manifest) if v.manifest else []:
            click.echo(f"{v.id}: {line}")


def _conversion(manifest: Manifest) -> Iterator[str]:
    """What stands out among decoder blocks that were quantized, and what all of them lost."""
    blocks = manifest.blocks
    if not blocks:
        return
    errors = [block.calibration.error for block in blocks]
    worst = max(range(len(errors)), key=errors.__getitem__)
    yield f"the output of block {worst} moved most, by {errors[worst]:.1%}"
    gains = {
        (index, kind): found.gain
        for index, block in enumerate(blocks)
        for kind, found in {"calibration text": block.calibration, **block.held_out}.items()
    }
    off = {place: gain for place, gain in gains.items() if abs(gain) > _NOTABLE_GAIN}
    if off:
        numbers = ", ".join(map(str, sorted({index for index, _ in off})))
        index, kind = max(off, key=lambda place: abs(off[place]))
        yield (
            f"the gain of these blocks is off by more than {_NOTABLE_GAIN:.0%}: {numbers}; "
            f"most that of block {index}, by {off[index, kind]:+.1%} on {kind}"
        )
    ratios = {kind: loss.kld / loss.rounding_kld for kind, loss in manifest.held_out.items()}
    if ratios:
        kind = max(ratios, key=ratios.__getitem__)
        yield (
            f"on held-out text its KLD is {sum(ratios.values()) / len(ratios):.2f} times that of "
            f"rounding to nearest, {ratios[kind]:.2f} at worst ({kind})"
        )


def evaluated(result: Compared, as_json: bool) -> None:
    """Every metric of every model; then what pairs of them show, and the answers to prompts."""
    measured = result.models
    if as_json:
        models = {
            name: found.model_dump(
                mode="json",
                include={"metrics": True, "texts": {"__all__": {"metrics"}}, "prompts": True},
            )
            for name, found in measured.items()
        }
        comparisons = [one.model_dump(mode="json") for one in result.comparisons]
        groups = [
            {"measure": measure, "text": text, "groups": found}
            for (measure, text), found in result.groups.items()
        ]
        print_json({"models": models, "comparisons": comparisons, "groups": groups})
        return
    texts = list(dict.fromkeys(text for found in measured.values() for text in found.texts))
    if len(texts) > 1:
        for text in texts:
            on_it = {n: one.texts[text].metrics for n, one in measured.items() if text in one.texts}
            _metrics(f"metric on {text}", on_it)
            click.echo()
        _over_texts({name: found.texts for name, found in measured.items()})
        _metrics("metric", {name: found.metrics for name, found in measured.items()})
    else:
        _metrics("metric", {name: _all_metrics(found) for name, found in measured.items()})
    _verdicts(result)
    for name, found in measured.items():
        if found.prompts:
            _prompts(name, found.prompts)


def _all_metrics(found: Evaluated) -> dict[str, Metric]:
    """Those of a single text, of tasks and of prompts."""
    of_texts = {name: m for one in found.texts.values() for name, m in one.metrics.items()}
    return of_texts | found.metrics


def _metrics(title: str, measured: Mapping[str, Mapping[str, Metric]]) -> None:
    """A line a metric, a column a model; nothing where nothing was measured."""
    keys = list(dict.fromkeys(key for metrics in measured.values() for key in metrics))
    if keys:
        print_table(
            [title, *measured],
            ([key, *(_metric(metrics.get(key)) for metrics in measured.values())] for key in keys),
        )


def _over_texts(measured: Mapping[str, Mapping[str, OnText]]) -> None:
    """The divergence on several texts together, where there is a reference."""
    from quantkit.recommendation.nearness import divergences, mean, worst_text

    lines = []
    for name, texts in measured.items():
        found, worst = divergences(texts), worst_text(texts)
        if worst is not None:
            average = _estimate(*mean(found.values()))
            lines.append([name, average, _metric(found[worst]), worst])
    if lines:
        print_table(["kld_mean over texts", "average", "worst", "on"], lines)
        click.echo()


def _verdicts(result: Compared) -> None:
    """A table a measure and text, and what it tells apart."""
    from quantkit.reports.drifts import pairs

    for (measure, text), groups in result.groups.items():
        click.echo()
        ones = [c for c in result.comparisons if (c.measure, c.text) == (measure, text)]
        print_table(*pairs(ones))
        if len(groups) == 1:
            click.echo("the data tell none of them apart")
        else:
            told = " | ".join(", ".join(group) for group in groups)
            click.echo(f"told apart, from the lowest value up, unranked within bars: {told}")


def _prompts(name: str, drift: PromptDrift) -> None:
    """One model's answers by category, and those that differ the most."""
    groups = [("all", drift.overall)]
    groups += [(group.category or "(none)", group) for group in drift.categories]
    click.echo()
    print_table(
        [f"{name}: category", "prompts", "exact match", "first difference, median", "KLD"],
        (
            [
                title,
                str(group.n),
                _estimate(group.exact_match, group.exact_match_stderr),
                _number(group.first_difference_median, "g"),
                _estimate(group.kld_mean, group.kld_stderr),
            ]
            for title, group in groups
        ),
    )
    for one in drift.most_different:
        click.echo(
            f"\n{name}: prompt {printable(one.id)}, another token from {one.first_difference} on, "
            f"KLD {one.kld:.3g}"
        )
        for what, text in (
            ("prompt", one.prompt),
            ("both", one.common),
            ("reference", one.reference),
            ("here", one.answer),
        ):
            click.echo(f"  {what:9}  {printable(text)}")


def problems(path: Path, found: Sequence[str], as_json: bool) -> None:
    """What `verify` found."""
    if as_json:
        print_json({"path": str(path), "problems": list(found)})
        return
    for problem in found:
        click.echo(problem)
    click.echo(f"{path}: {len(found)} problems" if found else f"{path}: as its manifest says")


def engines(statuses: Sequence[ToolchainStatus], as_json: bool) -> None:
    """Which engines are installed, and where."""
    if as_json:
        print_json([asdict(status) for status in statuses])
        return
    print_table(
        ["engine", "version", "what for", "where"],
        (
            [
                s.name,
                s.version or "not installed",
                s.purpose,
                f"{s.path or ''}{' (yours)' if s.own else ''}",
            ]
            for s in statuses
        ),
    )


def _row_cells(row: Row, texts: int, others: Iterable[str], levels: Iterable[int]) -> list[str]:
    throughput = {bench.concurrency: bench.output_tokens_per_s for bench in row.bench}
    return [
        row.id,
        _number(row.bytes and row.bytes / 1e6, ".1f"),
        _number(row.bits_per_weight, ".2f"),
        *(_mean_and_worst(row) if texts > 1 else _of_one_text(row) if texts else ()),
        *(_metric(row.metrics.get(name)) for name in others),
        *(_number(throughput.get(level), ".1f") for level in levels),
    ]


def _of_one_text(row: Row) -> list[str]:
    return [_metric(next(iter(row.by_text(name).values()), None)) for name in _OF_TEXTS]


def _mean_and_worst(row: Row) -> list[str]:
    """The divergence over all texts and on the worst, the worst's name, and the perplexity there;
    the source itself has no worst."""
    from quantkit.recommendation.nearness import divergences, mean, worst_text

    found, worst = divergences(row.texts), worst_text(row.texts)
    if worst is None or row.id == REFERENCE:
        return ["–"] * 4
    average = _estimate(*mean(found.values()))
    return [average, _metric(found[worst]), worst, _metric(row.metric("ppl", worst))]


def _metric(metric: Metric | None) -> str:
    if metric is None:
        return "–"
    return _estimate(metric.value, metric.stderr)


def _estimate(value: float, stderr: float | None) -> str:
    return f"{value:.4g}" + (f" ± {stderr:.2g}" if stderr is not None else "")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
