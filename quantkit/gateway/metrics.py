"""``/metrics``: what the gateway counts, and what its engines say of themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from quantkit.gateway.backends import Serving
from quantkit.gateway.local import Local
from quantkit.gateway.pool import Pool

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS_FOR_AN_ENGINE = 5.0
"""Seconds: half of what Prometheus waits by default, so that a hanging engine does not hide the
others."""
_TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_LABELS = ("model", "backend", "engine")


@dataclass(frozen=True)
class Meters:
    """What is counted of one model on one backend."""

    prompt_tokens: Counter
    output_tokens: Counter
    ttft: Histogram
    itl: Histogram


class Metrics:
    """The numbers of one gateway."""

    def __init__(self, pool: Pool) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._pool = pool
        self._meters: dict[tuple[str, str], Meters] = {}
        here: dict[str, Any] = {"namespace": "quantkit", "registry": self._registry}
        self._requests = Counter(
            "requests", "Requests by their answer's status.", (*_LABELS, "status"), **here
        )
        self._prompt = Counter("prompt_tokens", "Tokens of prompts.", _LABELS, **here)
        self._output = Counter("output_tokens", "Tokens of answers.", _LABELS, **here)
        self._ttft = Histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to the first event of its stream.",
            _LABELS, buckets=_TTFT, **here,
        )  # fmt: skip
        self._itl = Histogram(
            "inter_token_latency_seconds",
            "Between the events of a stream.",
            _LABELS, buckets=_ITL, **here,
        )  # fmt: skip
        self._registry.register(_Engines(pool))

    def of(self, model: str, backend: Serving) -> Meters:
        """Those of a model on a backend; made on first use."""
        found = self._meters.get((model, backend.name))
        if found is None:
            labels = (model, backend.name, backend.engine)
            found = Meters(
                self._prompt.labels(*labels),
                self._output.labels(*labels),
                self._ttft.labels(*labels),
                self._itl.labels(*labels),
            )
            self._meters[model, backend.name] = found
        return found

    def count(self, model: str, backend: Serving | None, status: int) -> None:
        """One request has its answer; ``model`` and ``backend`` as far as they were found."""
        where = (backend.name, backend.engine) if backend else ("", "")
        self._requests.labels(model, *where, str(status)).inc()

    async def text(self, session: aiohttp.ClientSession) -> bytes:
        """Everything in Prometheus' text format."""
        running = [one for one in self._pool.locals if one.ready]
        texts = await asyncio.gather(*(_of_engine(session, one) for one in running))
        answered = [(one, text) for one, text in zip(running, texts, strict=True) if text]
        return await asyncio.to_thread(self._join, answered)

    def _join(self, texts: Sequence[tuple[Local, str]]) -> bytes:
        theirs = CollectorRegistry()
        theirs.register(_Relabelled(texts))
        return generate_latest(self._registry) + generate_latest(theirs)


async def _of_engine(session: aiohttp.ClientSession, backend: Local) -> str:
    process = backend.process
    if process is None:
        return ""
    try:
        async with session.get(
            f"{process.url}/metrics",
            headers={"Authorization": f"Bearer {process.key}"},
            timeout=aiohttp.ClientTimeout(total=_SECONDS_FOR_AN_ENGINE),
        ) as answer:
            return await answer.text() if answer.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError, UnicodeDecodeError):
        return ""


class _Engines(Collector):
    """How the backends are at this moment."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        everyone = self._pool.backends.values()
        labels = ("backend", "engine")
        running = GaugeMetricFamily(
            "quantkit_requests_running", "Requests that have a slot.", labels=labels
        )
        queued = GaugeMetricFamily(
            "quantkit_requests_queued", "Requests that wait for a slot or a start.", labels=labels
        )
        for one in everyone:
            computed = min(one.using, one.section.slots)
            running.add_metric((one.name, one.engine), computed)
            queued.add_metric((one.name, one.engine), one.requests - computed)
        up = GaugeMetricFamily("quantkit_engine_up", "Whether it answers.", labels=labels)
        memory = GaugeMetricFamily(
            "quantkit_engine_memory_bytes", "Resident memory of its processes.", labels=labels
        )
        restarts = CounterMetricFamily(
            "quantkit_engine_restarts", "How often it died and was restarted.", labels=labels
        )
        for one in self._pool.locals:
            up.add_metric((one.name, one.engine), one.ready)
            memory.add_metric((one.name, one.engine), one.memory)
            restarts.add_metric((one.name, one.engine), one.restarts)
        yield from (running, queued, up, memory, restarts)


class _Relabelled(Collector):
    """The engines' own metrics, each with the labels ``backend`` and ``engine``.

    A label of theirs with such a name becomes ``exported_…``, as Prometheus itself would have it.
    """

    def __init__(self, texts: Iterable[tuple[Local, str]]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for backend, text in self._texts:
            ours = {"backend": backend.name, "engine": backend.engine}
            try:
                found = list(text_string_to_metric_families(text))
            except ValueError:
                continue
            for metric in found:
                family = families.setdefault(
                    metric.name, Metric(metric.name, metric.documentation, metric.type)
                )
                for sample in metric.samples:
                    theirs = {
                        f"exported_{key}" if key in ours else key: value
                        for key, value in sample.labels.items()
                    }
                    family.samples.append(sample._replace(labels=ours | theirs))
        yield from families.values()
