# ruff: noqa: RUF001 (the report writes a real minus sign)
"""The report's part on where the loss comes from: signs, sums, the floor, and both pages."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from quantkit.ledger import Ledger
from quantkit.ledger.loss import Loss, NoiseFloor, Part
from quantkit.models.engine_config import EngineConfig
from quantkit.reports.cautions import cautions
from quantkit.reports.noise import against_floor
from quantkit.reports.pages import html, markdown
from quantkit.reports.panels import Mark
from quantkit.reports.prose import plain
from quantkit.reports.split import Losses, losses
from tests import ledgers
from tests.engine_configs import config

LLAMACPP, VLLM = config("llamacpp 0.3.36"), config("vllm 0.32.0")
PROTOCOL = {"context": 512, "windows": 12}


def part(value: float, stderr: float | None = 0.001) -> Part:
    return Part(value=value, stderr=stderr)


def loss(
    conversion: float | None,
    quantization: float | None,
    engine: float | None,
    *,
    serving: EngineConfig | None = LLAMACPP,
    kld: float | None = None,
    notes: tuple[str, ...] = (),
) -> Loss:
    known = [value for value in (conversion, quantization, engine) if value is not None]
    return Loss(
        conversion=None if conversion is None else part(conversion),
        quantization=None if quantization is None else part(quantization),
        engine=None if engine is None else part(engine),
        total=part(sum(known)),
        kld=None if kld is None else part(kld),
        kld_quantization=part(0.02),
        windows=12,
        reference_engine=config("transformers 5.19.0"),
        serving_engine=serving,
        protocol=PROTOCOL,
        notes=list(notes),
    )


def floor(engine: EngineConfig, nll: Part, kld: float | None, batch: int = 1) -> NoiseFloor:
    return NoiseFloor(
        engine=engine,
        batch=batch,
        weights="gguf:BF16" if engine == LLAMACPP else "safetensors:bf16",
        nll=nll,
        kld=None if kld is None else part(kld),
        top1_agreement=None if kld is None else part(0.994),
        windows=12,
        protocol=PROTOCOL,
    )


def split() -> Ledger:
    """Q8_0 below the floor, Q4_K_M above it, Q4_0 with a part that gains, GPTQ half measured."""
    ledger = ledgers.quickstart().model_copy(
        update={
            "noise_floor": [
                floor(LLAMACPP, part(0.0002, 0.0001), 0.0001),
                floor(VLLM, part(-0.001, 0.002), None),
            ]
        }
    )
    found = [
        loss(0.0002, 0.0001, -0.0001, kld=0.00009),
        loss(0.0002, 0.02, 0.004, kld=0.03),
        loss(0.0002, 0.1, -0.03, kld=0.12),
        loss(None, 0.05, None, serving=None, notes=("engine not measured: vllm is missing",)),
        loss(None, 0.003, 0.001, serving=VLLM),
    ]
    for index, one in enumerate(found, 1):
        ledger = ledgers.with_row(ledger, index, loss=one)
    return ledger


def test_parts_are_stacked_end_to_end_and_gains_stand_left_of_zero() -> None:
    found = losses(split())
    assert found is not None
    assert found.chart is not None
    panel = found.chart.panels[0]
    zero = panel.line_at
    assert zero is not None
    rows: dict[float, dict[str, Mark]] = {}
    for mark in panel.marks:
        rows.setdefault(mark.y, {})[mark.kind] = mark
    assert [sorted(row) for row in rows.values()] == [
        ["total"], ["total"],
        *[["conversion", "engine", "quantization", "total"]] * 3,
        ["quantization", "total"], ["engine", "quantization", "total"],
    ]  # fmt: skip
    for row in list(rows.values())[2:]:
        spans = {kind: mark.span for kind, mark in row.items() if kind != "total" and mark.span}
        gains = {kind for kind, (left, _) in spans.items() if left < zero - 0.01}
        assert gains <= {"engine"}
        end = zero
        for kind in ("conversion", "quantization", "engine"):
            if kind in spans and kind not in gains:
                assert spans[kind][0] == pytest.approx(end, abs=0.02)
                end = spans[kind][1]
        lost = sum(zero - spans[kind][0] for kind in gains)
        assert all(spans[kind][1] == pytest.approx(zero, abs=0.02) for kind in gains)
        assert row["total"].x == pytest.approx(end - lost, abs=0.05)
    worst = list(rows.values())[4]["engine"].span
    assert worst is not None
    assert worst[0] < zero - 20


def test_a_drift_below_the_floor_says_so() -> None:
    ledger = split()
    shares = [against_floor(ledger, row) for row in ledger.variants]
    assert shares[0] is None  # the reference
    assert shares[4] is None  # not measured on the engine that serves it
    q8, q4, _, _, awq = shares[1:]
    assert q8 is not None
    assert q8.below == ("KL divergence", "perplexity")
    assert q8.kld == pytest.approx(0.9)
    # The floor's loss may be as large as 0.0002 and twice its error.
    assert q8.loss == pytest.approx(0.0002 / (0.0002 + 1.959964 * 0.0001))
    assert q4 is not None
    assert q4.below == ()
    assert q4.kld == pytest.approx(300)
    assert awq is not None
    assert (awq.kld, awq.below) == (None, ("perplexity",))
    found = losses(ledger)
    assert found is not None
    said = {line.id: line.against_floor for line in found.lines}
    assert said["gguf-Q8_0"] == "below the noise floor: KL divergence and perplexity"
    assert said["gguf-Q4_K_M"] == "KLD 300 × the floor"
    assert said["gptq-w4g64"] == "–"
    (caution,) = [plain(one) for one in cautions(ledger) if "noise floor" in plain(one)]
    assert caution.endswith("gguf-Q8_0: KL divergence, gguf-Q8_0: perplexity and "
                            "awq-w4g64: perplexity.")  # fmt: skip


def _with_floor(nll: float, kld: float) -> Ledger:
    """Beside the other engines' floors, one of the reference engine in other batches."""
    batches = floor(config("transformers 5.19.0"), part(nll, 0.0), kld, batch=2)
    ledger = split()
    return ledger.model_copy(update={"noise_floor": [batches, *ledger.noise_floor]})


def test_a_floor_by_another_batch_size_that_is_nothing_changes_nothing() -> None:
    """As on a CPU. What no other engine served has at least this one."""
    before, after = (
        [against_floor(ledger, row) for row in ledger.variants]
        for ledger in (split(), _with_floor(0.0, 0.0))
    )
    unserved = after[4]
    assert unserved is not None
    assert (unserved.kld, unserved.below) == (math.inf, ())
    assert [*after[:4], None, after[5]] == before
    found = losses(_with_floor(0.0, 0.0))
    assert found is not None
    said = {line.id: line for line in found.lines}
    line = said["noise floor: batch × 2"]
    assert (line.engine, line.total, line.ppl) == ("transformers 5.19.0", ("0", ""), "0.00 %")
    assert said["gptq-w4g64"].against_floor == "KLD above the floor, which is 0"


def test_the_larger_floor_counts() -> None:
    """As on a GPU that rounds to bfloat16."""
    ledger = _with_floor(0.03, 0.025)
    below = [found.below for row in ledger.variants if (found := against_floor(ledger, row))]
    both = ("KL divergence", "perplexity")
    assert below == [both, ("perplexity",), (), ("KL divergence",), ("perplexity",)]
    found = losses(ledger)
    assert found is not None
    assert found.lines[-2].against_floor == "below the noise floor: KL divergence"


def test_a_floor_by_another_protocol_is_not_taken() -> None:
    ledger = split()
    other = [one.model_copy(update={"protocol": {"context": 2048}}) for one in ledger.noise_floor]
    ledger = ledger.model_copy(update={"noise_floor": other})
    assert all(against_floor(ledger, row) is None for row in ledger.variants)
    assert not any("noise floor" in plain(one) for one in cautions(ledger))


class _Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and data.strip():
            self.rows[-1].append(data.strip())


def test_both_pages_have_every_number() -> None:
    page = _Text(html(split()))
    (row,) = (row for row in page.rows if row[0] == "gguf-Q4_0" and "floor" in row[-1])
    assert row == [
        "gguf-Q4_0", str(LLAMACPP), "+0.0002", "± 0.0010", "+0.1000", "± 0.0010",
        "−0.0300", "± 0.0010",
        "+0.0702", "± 0.0010", "+7.27 %", "0.0200", "± 0.0010", "0.1200", "± 0.0010",
        "KLD 1,200 × the floor",
    ]  # fmt: skip
    assert "engine not measured: vllm is missing" in page.text
    lines = markdown(split()).splitlines()
    assert (
        "| `gptq-w4g64` | `transformers 5.19.0 only` | – | +0.0500 ± 0.0010 | – | +0.0500 ± 0.0010 "
        "| +5.13 % | 0.0200 ± 0.0010 | – | – |"
    ) in lines
    assert "- `gptq-w4g64`: `engine not measured: vllm is missing`" in lines
    rendered = _Text(MarkdownIt("commonmark", {"html": True}).enable("table").render(
        "\n".join(lines)
    ))  # fmt: skip
    assert "---" not in rendered.text


def test_rounded_activations_have_a_column_where_there_are_some() -> None:
    assert losses_of(split()).parts == ("conversion", "quantization", "engine")
    rounded = loss(None, 0.003, 0.001, serving=VLLM).model_copy(update={"activations": part(0.02)})
    ledger = ledgers.with_row(split(), 5, loss=rounded)
    assert losses_of(ledger).parts == ("conversion", "quantization", "activations", "engine")
    page = _Text(html(ledger))
    (row,) = (row for row in page.rows if row[0] == "awq-w4g64" and str(VLLM) in row[1])
    assert row[2:8] == ["–", "+0.0030", "± 0.0010", "+0.0200", "± 0.0010", "+0.0010"]
    assert any(
        "| – | +0.0030 ± 0.0010 | +0.0200 ± 0.0010 | +0.0010 ± 0.0010 |" in line
        for line in markdown(ledger).splitlines()
    )


def losses_of(ledger: Ledger) -> Losses:
    found = losses(ledger)
    assert found is not None
    return found


def test_hostile_strings_stay_text() -> None:
    nasty = ledgers.HOSTILE
    bad = loss(0.1, 0.1, 0.1, serving=ledgers.HOSTILE_ENGINE, notes=(nasty,)).model_copy(
        update={"reference_engine": ledgers.HOSTILE_ENGINE}
    )
    floors = [floor(ledgers.HOSTILE_ENGINE, part(0.1), 0.1).model_copy(update={"weights": nasty})]
    ledger = ledgers.with_row(split(), 1, loss=bad).model_copy(update={"noise_floor": floors})
    assert _Text(html(ledger)).tags == _Text(html(split())).tags
    assert " ".join(nasty.split()) in " ".join(_Text(html(ledger)).text.split())
    assert "<img" not in _Text(html(ledger)).tags
    markdown_tags = _Text(MarkdownIt("commonmark", {"html": True}).render(markdown(ledger))).tags
    assert not markdown_tags & {"img", "script", "a"}


def test_without_a_split_there_is_no_such_part() -> None:
    assert losses(ledgers.quickstart()) is None
    assert "loss comes from" not in html(ledgers.quickstart())
