"""What the report says of load: the recommendation, claims, curves, and what serving takes."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from quantkit.ledger import Ledger, Row
from quantkit.ledger.load import RateBench
from quantkit.recommendation import Wants, recommend
from quantkit.reports.claims import Claims, claims, conclusion
from quantkit.reports.curves import curves, spread_out
from quantkit.reports.efficiency import efficiency_chart, loads
from quantkit.reports.prose import Prose, plain
from quantkit.reports.recommendation import advice
from quantkit.reports.tradeoff import tradeoffs
from tests import ledgers
from tests import loads as made_up
from tests.engine_configs import config

VLLM, LLAMACPP = config("vllm 0.32.0"), config("llamacpp 1")


def said(sentences: list[Prose]) -> str:
    return "\n".join(map(plain, sentences))


def with_benches(ledger: Ledger, **benches: list[made_up.Bench]) -> Ledger:
    """The ledger with these benches, by id with _ for -, and none of the others'."""
    rows: list[Row] = [
        row.model_copy(update={"bench": benches.get(row.id.replace("-", "_"), []), "goodput": []})
        for row in ledger.variants
    ]
    return ledger.model_copy(update={"variants": rows})


def test_the_recommendation_in_words() -> None:
    ledger = ledgers.swept()
    found = advice(
        ledger,
        recommend(ledger, Wants(profile="server", max_memory=10**9, max_kld=0.05, concurrency=8)),
    )
    assert plain(found.ship) == "Ship gguf-Q4_K_M on llamacpp."
    # 66.1 x 3 x 8 / 10 = 158.6, 2 % to each side.
    assert plain(found.numbers) == (
        "159 (155 to 162) output tokens/s with 8 requests at a time; KL divergence 0.0241 (0.0233 "
        "to 0.0249) nats; perplexity +2.6 %; goodput 1.65 requests/s at TTFT ≤ 500 ms, ITL ≤ 50 "
        "ms; 472 MB of memory at peak, 105 MB of it weights (39 % of the reference's 269 MB)."
    )
    assert plain(found.why) == (
        "Of those within the limits it serves the most requests within the objective."
    )
    assert plain(found.runner_up).startswith("gguf-Q8_0 on llamacpp: 143 instead of 159 tokens/s")
    assert "0.000940 instead of 0.0241 nats (nearer to the reference)" in plain(found.runner_up)
    assert said(found.binds).splitlines() == [
        "max-memory raised from 1.00 GB to 2.15 GB (2.1 times as much) would make it gptq-w4g64 on "
        "vllm with 192 tokens/s.",
        "max-kld raised from 0.0500 nats to 0.123 nats (2.5 times as much) would make it gguf-Q4_0 "
        "on llamacpp with 178 tokens/s.",
    ]
    assert "gptq-w4g64 on vllm: memory 2.15 GB, 1.15 GB above 1.00 GB." in said(found.excluded)


def test_what_is_undecided_is_said() -> None:
    ledger = ledgers.swept()
    found = advice(ledger, recommend(ledger, Wants(profile="server", max_kld=0.0390)))
    undecided = said(found.undecided)
    assert plain(found.ship) == "Ship gguf-Q4_K_M on llamacpp."
    assert (
        "Whether gptq-w4g64 on vllm meets the limit: KL divergence 0.0388 nats (0.0376 to 0.0400), "
        "at most 0.0390 nats; if it does, it is the one to ship." in undecided
    )
    assert "The true speed of gguf-Q8_0 on vllm" in undecided
    environment = ledger.environment.model_copy(update={"gpu": "H100"})
    with_gpu = ledger.model_copy(update={"environment": environment})
    assert "memory is used on the GPU" in said(advice(with_gpu, recommend(with_gpu)).undecided)
    nothing = advice(ledger, recommend(ledger, Wants(max_memory=10**6)))
    assert plain(nothing.ship).startswith("Nothing can be recommended")
    assert (nothing.numbers, nothing.why, nothing.runner_up) == ((), (), ())


def checked(ledger: Ledger) -> Claims:
    found = claims(ledger)
    assert found is not None
    return found


def test_the_race_of_two_engines_by_hand() -> None:
    ledger = with_benches(
        ledgers.swept(),
        reference=[made_up.bench(VLLM, n, [r] * 3) for n, r in ((1, 30.0), (8, 150.0))],
        gguf_F16=[made_up.bench(LLAMACPP, n, [r] * 3) for n, r in ((1, 60.0), (8, 100.0))],
        gguf_Q8_0=[made_up.bench(LLAMACPP, n, [r] * 3) for n, r in ((1, 90.0), (8, 160.0))],
    )
    reference, best = checked(ledger).races
    assert reference.title == "The reference, unquantized"
    # 30 / 60 and 150 / 100; 4 % / (2 - 4 %) = 2.04 % to each side of both.
    assert [(level, ratio.value) for level, ratio, *_ in reference.ratios] == [(1, 0.5), (8, 1.5)]
    low, high = (1 - 0.04 / 1.96) / (1 + 0.04 / 1.96), (1 + 0.04 / 1.96) / (1 - 0.04 / 1.96)
    assert reference.ratios[1][1].low == pytest.approx(1.5 * low)
    assert reference.ratios[1][1].high == pytest.approx(1.5 * high)
    assert plain(reference.says) == (
        "vLLM is 0.50 (0.48 to 0.52) times as fast as llama.cpp with 1 request at a time, 1.50 "
        "(1.44 to 1.56) with 8; the lead changes between 1 and 8 requests at a time."
    )
    assert [ratio.value for _, ratio, *_ in best.ratios] == [30 / 90, 150 / 160]
    assert "change" not in plain(best.says)


def test_what_the_data_cannot_tell_apart_is_no_lead() -> None:
    ledger = with_benches(
        ledgers.swept(),
        reference=[made_up.bench(VLLM, 4, [100.0] * 3)],
        gguf_F16=[made_up.bench(LLAMACPP, 4, [102.0] * 3, client_bound=True)],
    )
    text = plain(checked(ledger).races[0].says)
    assert "with 4 the two cannot be told apart; with 4 the load generator was the" in text


def test_the_same_file_on_both_engines_is_a_race_of_its_own() -> None:
    titles = [race.title for race in checked(ledgers.swept()).races]
    assert titles == ["The reference, unquantized", "gguf-Q8_0", "The fastest variant of each"]


def test_int4_is_set_against_the_unquantized_on_the_same_engine() -> None:
    found = {(one.id, one.base): one for one in checked(ledgers.swept()).int4}
    assert set(found) == {
        ("gguf-Q4_K_M", "gguf-F16"), ("gguf-Q4_0", "gguf-F16"), ("gptq-w4g64", "reference"),
        ("awq-w4g64", "reference"),
    }  # fmt: skip
    one = found["gptq-w4g64", "reference"]
    # 39.2 / 27.9; then 113 of 269 MB; 2.15 of 2.31 GB.
    assert [cell.text for cell in one.cells] == [
        "1.41", "1.29", "1.18", "113 MB", "2.15 GB", "0.0388", "+0.7 points",
    ]  # fmt: skip
    assert [cell.detail for cell in one.cells[3:5]] == ["42 %", "93 %"]
    # The demo served no unquantized GGUF: nothing to compare those with.
    rows = {one.id: one for one in checked(ledgers.quickstart()).int4}
    assert rows["gguf-Q4_0"].base == "–"
    assert rows["gguf-Q4_0"].cells[0].text == "–"
    assert "gguf" not in plain(conclusion(checked(ledgers.quickstart())))


def test_nothing_is_claimed_of_what_was_not_run() -> None:
    only = with_benches(ledgers.swept(), gguf_Q8_0=[made_up.bench(LLAMACPP, 4, [100.0] * 3)])
    assert claims(only) is None
    assert claims(ledgers.unmeasured()) is None


def test_labels_of_curves_keep_their_order_and_their_distance() -> None:
    rng = random.Random(0)
    for _ in range(200):
        wanted = [rng.uniform(0, 300) for _ in range(rng.randint(1, 15))]
        found = spread_out(wanted, 17.0, 0.0, 300.0)
        order = sorted(range(len(wanted)), key=wanted.__getitem__)
        heights = [found[i] for i in order]
        assert all(b - a >= 17.0 - 0.02 for a, b in pairwise(heights))
        assert min(heights) >= -0.01
        assert max(heights) <= 300.01
    assert spread_out([10.0, 100.0], 17.0, 0.0, 300.0) == [10.0, 100.0]
    assert spread_out([99.0, 101.0], 17.0, 0.0, 300.0) == [91.5, 108.5]


def test_curves_are_drawn_of_a_sweep_only() -> None:
    assert curves(ledgers.quickstart()) is None
    chart = curves(ledgers.swept(), recommend(ledgers.swept(), Wants(profile="server")))
    assert chart is not None
    assert [curve.id for curve in chart.curves if curve.recommended] == ["gptq-w4g64"]
    assert all(len(curve.stops) == 6 for curve in chart.curves)
    (bound,) = [curve for curve in chart.curves if any(s.client_bound for s in curve.stops)]
    assert bound.label == "gguf-Q8_0, vllm"
    assert "the load generator was the bottleneck" in bound.stops[-1].words
    # More tokens a second are higher up.
    first = chart.curves[0].stops
    assert [stop.y for stop in first] == sorted((stop.y for stop in first), reverse=True)


def test_the_picture_says_who_is_on_the_front() -> None:
    chart = next(one for one in tradeoffs(ledgers.swept()) if one.concurrency == 32)
    assert plain(chart.says) == (
        "No other is both faster and nearer to the reference than reference on vllm. Inside the "
        "noise, so on the front or just behind it: gptq-w4g64 on vllm and awq-w4g64 on vllm. "
        "Beaten in both, beyond the noise: gguf-F16 on llamacpp, gguf-Q8_0 on llamacpp, gguf-Q8_0 "
        "on vllm, gguf-Q4_K_M on llamacpp and gguf-Q4_0 on llamacpp. "
    )
    words = {point.id: point.words.splitlines()[-1] for point in chart.points}
    assert words["gguf-F16"] == "beaten in both by reference on vllm"
    assert words["gptq-w4g64"] == "not decided against awq-w4g64 on vllm"


def test_every_load_has_a_row_and_only_columns_with_values() -> None:
    found = loads(ledgers.swept())
    assert len(found.rows) == 8 * (6 + 1)  # loads and goodputs
    first = [cell.text for cell in found.rows[6][2][:3]]
    assert first == ["goodput, TTFT ≤ 500 ms, ITL ≤ 50 ms", "41.6", "0.650"]
    cells = {title: found.rows[0][2][index].text for index, title in enumerate(found.columns)}
    # 0.4 an hour / 27.9 tokens/s / 3600 s x 10^6
    assert cells["cost of 10⁶ tokens"] == "3.98"
    assert "client" in found.columns
    assert "failed" not in found.columns
    plainer = loads(ledgers.quickstart())
    assert not {"J/token", "cost of 10⁶ tokens", "of bandwidth", "client"} & set(plainer.columns)


def test_open_loops_have_rows_too() -> None:
    ledger = ledgers.quickstart()
    closed = ledger.variants[1].bench[0].model_dump(exclude={"concurrency", "bandwidth"})
    rate = RateBench(**closed | {"attained": 0.97}, arrivals="poisson", rate_per_s=2.5)
    found = loads(ledgers.with_row(ledger, 1, rates=[rate]))
    (row,) = [cells for *_, cells in found.rows if cells[0].text == "2.50/s, poisson"]
    assert row[found.columns.index("met the objective")].text == "97 %"


def test_what_was_not_measured_has_no_panel() -> None:
    whole, bare = efficiency_chart(ledgers.swept()), efficiency_chart(ledgers.quickstart())
    assert whole is not None
    assert bare is not None
    assert [panel.title for panel in whole.panels] == [
        "Goodput", "Of the physical limit", "Cost", "Energy", "Start",
    ]  # fmt: skip
    assert [panel.title for panel in bare.panels] == ["Start"]
