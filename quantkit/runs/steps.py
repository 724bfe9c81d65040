"""What a run does, step by step, in the order in which it is done: the cheapest evidence first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import chain

from quantkit.benchmark.server import Servers
from quantkit.engines import first_serving, serving_engine
from quantkit.engines.base import Engine
from quantkit.evaluation.compare import compare
from quantkit.evaluation.section import EvaluateSection
from quantkit.ledger.drift import Comparison
from quantkit.ledger.loss import NoiseFloor
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers import load_producer
from quantkit.producers.base import Plan, SharesReading
from quantkit.producers.convert import groups
from quantkit.runs.course import Step
from quantkit.runs.directory import RunDirectory
from quantkit.runs.estimates import usual_seconds
from quantkit.runs.external import ExternalVariant
from quantkit.runs.loss_attribution import LossAttribution
from quantkit.runs.recipe import Recipe
from quantkit.runs.rows import RowBuilder
from quantkit.runs.stages import Benching, Evaluation, Texts, evaluated_as_served

_BATCHES = "batches"


class Work:
    """All that a recipe asks for, and what was found so far.

    ``rows``: the source's first, then one for each variant of the recipe. ``stack`` closes what
    must stay open between the steps.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Checkpoint,
        plans: Sequence[Plan],
        texts: Texts,
        directory: RunDirectory,
        stack: ExitStack,
        *,
        force: bool,
    ) -> None:
        self.own = RowBuilder.of_source(source)
        self.variants = {entry: RowBuilder.of_variant(entry) for entry in recipe.variants}
        self.comparisons: list[Comparison] = []
        self.evaluation: Evaluation | None = None
        self.benching: Benching | None = None
        self._floors: dict[str, NoiseFloor | None] = {}
        self._recipe, self._source, self._texts = recipe, source, texts
        self._section = evaluated_as_served(recipe)
        self._directory, self._stack = directory, stack
        self._calibrated = {plan.spec for plan in plans if plan.needs_calibration}
        makers = directory.variants(
            source,
            plans,
            texts.calibration,
            force=force,
            allow_tokenizer_differences=recipe.allow_tokenizer_differences,
        )
        self._makers = dict(zip((plan.spec for plan in plans), makers, strict=True))

    @property
    def rows(self) -> list[RowBuilder]:
        """In the order of the ledger."""
        return [self.own, *self.variants.values()]

    @property
    def noise_floor(self) -> list[NoiseFloor]:
        """What the engines do to the source: its own first, then those that serve variants."""
        found = [self._floors.get(name) for name in (_BATCHES, *self._served_by)]
        return [floor for floor in found if floor]

    def steps(self) -> list[Step]:
        """Variants that need no calibration come first, the source on its serving engine last.

        With an early stop the source answers what its variants needed: then all of them are
        evaluated before any is put under load.
        """
        section, batches = self._section, self._batches()
        made = [list(self._make(batch)) for batch in batches]
        served = [list(self._serve(batch)) for batch in batches]
        evidence = [*chain(*map(chain, made, served))]
        if section:
            prepare = self._step(None, "prepare", partial(self._prepare, section))
            evaluate = self._step(None, "evaluate", partial(self._evaluate, self.own))
            first = [prepare, evaluate]
            if section.until:
                first, evidence = [prepare, *chain(*made), evaluate], [*chain(*served)]
            evidence = [*first, *evidence]
        return [*evidence, *self._serve_source()]

    def _batches(self) -> list[list[Spec | ExternalVariant]]:
        """Variants that are made together; those that need calibration come last."""
        position = list(self.variants).index
        brought: list[list[Spec | ExternalVariant]]
        brought = [[entry] for entry in self.variants if isinstance(entry, ExternalVariant)]
        batches = [*map(list[Spec | ExternalVariant], groups(self._recipe.specs)), *brought]
        return sorted(
            batches,
            key=lambda batch: (not self._calibrated.isdisjoint(batch), position(batch[0])),
        )

    def _make(self, batch: Sequence[Spec | ExternalVariant]) -> Iterator[Step]:
        """Every model of the batch, then every drift."""
        for entry in batch:
            yield self._step(entry, "convert", partial(self._convert, entry, batch))
        if self._section:
            for entry in batch:
                work = partial(self._evaluate, self.variants[entry])
                yield self._step(entry, "evaluate", work)

    def _serve(self, batch: Sequence[Spec | ExternalVariant]) -> Iterator[Step]:
        """Every model under load, and where its loss comes from."""
        for entry in batch:
            row = self.variants[entry]
            if self._recipe.bench:
                yield self._step(entry, "bench", partial(self._bench, row))
            if self._splits:
                yield self._step(entry, "split", partial(self._split, row))

    def _serve_source(self) -> Iterator[Step]:
        if self._recipe.bench:
            yield self._step(None, "bench", partial(self._bench, self.own))
        if self._splits:
            yield self._step(None, "noise floor", self._measure_floors)

    def _step(
        self, entry: Spec | ExternalVariant | None, stage: str, work: Callable[[], None]
    ) -> Step:
        row = self.variants[entry] if entry else self.own
        usual = partial(usual_seconds, self._recipe, self._source, stage)
        if isinstance(entry, Spec):
            together = isinstance(load_producer(entry), SharesReading)
            by = first_serving(entry.format)
            usual = partial(
                usual,
                made=True,
                by_blocks=entry in self._calibrated and not together,
                engine=by.name if by else "",
            )
        return Step(row.id, stage, usual(), work)

    @property
    def _splits(self) -> bool:
        section = self._section
        return bool(section and section.split_windows and section.texts)

    def _convert(
        self, entry: Spec | ExternalVariant, batch: Sequence[Spec | ExternalVariant]
    ) -> None:
        """The first of the batch makes them all, so they share its time at the end."""
        row = self.variants[entry]
        if isinstance(entry, ExternalVariant):
            row.model = row.attempt("open", partial(entry.open, self._source))
        else:
            row.model = row.attempt("convert", self._makers[entry])
        if entry == batch[-1] and len(batch) > 1:
            together = [self.variants[one] for one in batch]
            each = sum(one.seconds["convert"] for one in together) / len(together)
            for one in together:
                one.seconds["convert"] = each

    def _prepare(self, section: EvaluateSection) -> None:
        with self.own.timed("prepare"):
            self.evaluation = Evaluation.prepare(
                section, self._source, self._texts, self._directory, len(self.variants)
            )

    def _evaluate(self, row: RowBuilder) -> None:
        section = self._section
        if row.model and section and self.evaluation:
            measure = partial(self.evaluation.measure, row.model)
            row.evaluated = row.attempt("evaluate", measure) or row.evaluated
            measured = {one.id: one.evaluated for one in self.rows}
            pairs = partial(compare, measured, section.tolerance)
            self.comparisons = self.own.attempt("compare", pairs) or self.comparisons

    def _bench(self, row: RowBuilder) -> None:
        """The engine's server is started once: it is also asked for what the split needs of it."""
        if row.model is None or self._recipe.bench is None:
            return
        if self.benching is None:
            prepared = Benching.prepared(self._recipe.bench, self._source, self._directory)
            self.benching = self._stack.enter_context(prepared)
        splitting = self._splitting
        asked = splitting is not None and splitting.asks_server(row.model)
        longest = splitting.longest if splitting and asked else None
        with self.benching.servers(row.model, longest) as servers:
            row.load(partial(self.benching.measure, servers))
            if asked and row is self.own:
                self._measure_floor(serving_engine(row.model), servers)
            elif asked:
                self._split(row, servers)

    def _split(self, row: RowBuilder, servers: Servers | None = None) -> None:
        if not isinstance(row.model, Variant) or not row.evaluated.texts:
            return
        if self._splitting and "split" not in row.seconds:
            split = partial(self._splitting.split, row.model, row.evaluated, servers)
            row.loss = row.attempt("split", split)

    def _measure_floors(self) -> None:
        if self._splitting and self._served_by:
            floor = self._splitting.batch_floor
            self._floors[_BATCHES] = self.own.attempt("noise floor", floor)
            for engine in self._served_by.values():
                self._measure_floor(engine)

    def _measure_floor(self, engine: Engine, servers: Servers | None = None) -> None:
        if self._splitting and engine.name in self._served_by and engine.name not in self._floors:
            floor = partial(self._splitting.floor, engine, servers)
            self._floors[engine.name] = self.own.attempt("noise floor", floor)

    @property
    def _served_by(self) -> dict[str, Engine]:
        """The engines of the variants that were measured on the text, by name."""
        engines = [
            serving_engine(row.model)
            for row in self.variants.values()
            if row.model and row.evaluated.texts
        ]
        return {engine.name: engine for engine in engines}

    @cached_property
    def _splitting(self) -> LossAttribution | None:
        """None where nothing is to be split; asked for when the source was evaluated."""
        section = self._section
        if section is None or self.evaluation is None:
            return None
        own = self.own.evaluated
        return LossAttribution.of(self.evaluation, self._source, own, section.split_windows)
