"""What to ship: hand-made ledgers whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from quantkit.errors import EvaluationError, RecipeError
from quantkit.ledger import Failure, Ledger, OnText, Row
from quantkit.ledger.drift import Comparison
from quantkit.ledger.load import Slo
from quantkit.recommendation import (
    PROFILES,
    Nearness,
    Recommendation,
    Wants,
    by_default,
    profiles,
    recommend,
)
from quantkit.recommendation.interval import Interval, of_repetitions
from quantkit.reports.prose import plain
from quantkit.reports.recommendation import advice
from tests import ledgers, loads
from tests.ledger_rows import CODE, DOCS, LLAMACPP, VLLM, with_metrics

MB = 10**6


def row(
    id_: str,
    kld: float,
    rates: Sequence[float],
    *,
    engine: str = LLAMACPP,
    memory: int = 400 * MB,
    error: float = 0.0001,
    **load: Any,
) -> Row:
    """A variant with a divergence, and a bench at 4 requests at a time with these repetitions."""
    like = ledgers.quickstart().variants[1]
    mean = like.texts[DOCS].metrics["kld_mean"].model_copy(update={"value": kld, "stderr": error})
    bench = [loads.bench(engine, 4, rates, memory=memory, **load)]
    return with_metrics(like, kld_mean=mean).model_copy(update={"id": id_, "bench": bench})


def ledger(*rows: Row) -> Ledger:
    """The reference, which was not benched, and these variants."""
    found = ledgers.quickstart()
    reference = found.variants[0].model_copy(update={"bench": []})
    return ledgers.with_pairs(found.model_copy(update={"variants": [reference, *rows]}))


def steady(rate: float) -> list[float]:
    """Three repetitions that agree: their interval is 2 % to each side."""
    return [rate, rate, rate]


def picked(found: Recommendation) -> str | None:
    return found.pick.candidate.row.id if found.pick else None


def states(found: Recommendation, id_: str) -> dict[str, str]:
    one = next(one for one in found.assessed if one.candidate.row.id == id_)
    return {check.limit.name: check.state for check in one.checks}


def by_speed(**given: Any) -> Wants:
    """As on a server, with a limit of 0.05 nats where no other is given."""
    limit = {} if "max_drop" in given else {"max_kld": 0.05}
    return Wants(profile="server", **(limit | given))


FAST = row("fast", 0.04, steady(200.0), memory=900 * MB)
NEAR = row("near", 0.001, steady(100.0), memory=600 * MB)
SMALL = row("small", 0.02, steady(50.0), memory=200 * MB)
FAR = row("far", 0.3, steady(300.0), memory=300 * MB)
FOUR = ledger(FAST, NEAR, SMALL, FAR)


@pytest.mark.parametrize(
    ("wants", "pick", "second"),
    [
        (by_speed(), "fast", "near"),  # 0.05 nats are the default
        (by_speed(max_kld=1.0), "far", "fast"),
        (by_speed(max_kld=0.03), "near", "small"),
        (by_speed(max_kld=0.03, max_memory=500 * MB), "small", None),
        (by_speed(max_memory=300 * MB), "small", None),
        (by_speed(max_drop=100.0), "far", "fast"),  # then the default on drift is off
        (by_speed(max_drop=100.0, max_kld=0.05), "fast", "near"),
        (by_speed(min_goodput=1.0, slo=Slo(itl_ms=50.0)), "fast", "near"),
        (by_speed(min_goodput=4.0, slo=Slo(itl_ms=50.0)), None, None),  # 200 / 64 = 3.1 requests/s
    ],
)
def test_the_fastest_of_those_that_meet_every_limit(
    wants: Wants, pick: str | None, second: str | None
) -> None:
    found = recommend(FOUR, wants)
    assert picked(found) == pick
    assert (found.runner_up.candidate.row.id if found.runner_up else None) == second


def test_the_limit_that_binds_is_the_one_that_needs_the_least_change() -> None:
    found = recommend(FOUR, by_speed(max_memory=500 * MB, max_kld=0.03))
    assert picked(found) == "small"
    memory, drift = found.loosened
    # near needs 600 MB, a fifth more; far needs 0.3 + 1.96 * 0.0001 nats, ten times as much.
    assert (memory.limit.name, memory.limit.bound) == ("max-memory", 600 * MB)
    assert memory.pick.candidate.row.id == "near"
    assert memory.share == pytest.approx(0.2)
    assert (drift.limit.name, drift.pick.candidate.row.id) == ("max-kld", "far")
    assert drift.limit.bound == 0.301  # rounded up: what is shown suffices
    again = by_speed(max_memory=500 * MB, max_kld=drift.limit.bound)
    assert picked(recommend(FOUR, again)) == "far"


def test_a_limit_that_keeps_nobody_better_out_does_not_bind() -> None:
    assert recommend(FOUR, by_speed(max_kld=1.0, max_memory=10**10)).loosened == ()


def test_goodput_and_latency_bind_downwards_and_upwards() -> None:
    late = row("late", 0.001, steady(200.0), ttft_p95=600.0)
    soon = row("soon", 0.001, steady(100.0), ttft_p95=300.0)
    found = recommend(ledger(late, soon), by_speed(slo=Slo(ttft_ms=500.0)))
    assert picked(found) == "soon"
    # Repetitions that agree have 4 % / (2 - 4 %) to each side: 600 ms are at most 612.3 ms.
    (binding,) = found.loosened
    assert (binding.limit.name, binding.limit.bound) == ("slo (ttft_ms)", 613.0)
    found = recommend(ledger(late, soon), by_speed(slo=Slo(ttft_ms=500.0), min_goodput=1.0))
    assert picked(found) == "soon"  # late reaches nothing within 500 ms, soon 100 / 64
    found = recommend(ledger(late, soon), by_speed(slo=Slo(ttft_ms=1000.0), min_goodput=2.0))
    assert picked(found) == "late"
    assert states(found, "soon") == {"max-kld": "met", "min-goodput": "undecided"}


def test_a_goodput_that_was_searched_for_comes_before_what_loops_show() -> None:
    one = row("one", 0.001, steady(100.0)).model_copy(
        update={"goodput": [loads.goodput(LLAMACPP, 0.9, 1.1)]}
    )
    for least, state in ((0.9, "met"), (1.0, "undecided"), (1.2, "excluded")):
        found = recommend(ledger(one), by_speed(min_goodput=least))  # the ledger has one objective
        assert states(found, "one")["min-goodput"] == state
    # Another objective: 100 / 64 = 1.56 requests/s were completed within it.
    found = recommend(ledger(one), by_speed(min_goodput=1.5, slo=Slo(ttft_ms=400.0)))
    assert states(found, "one")["min-goodput"] == "met"
    with pytest.raises(RecipeError, match="this run has none"):
        recommend(FOUR, by_speed(min_goodput=1.0))


def test_throughputs_inside_the_noise_are_decided_by_memory() -> None:
    quick = row("quick", 0.002, [100.0, 104.0, 108.0], memory=900 * MB)
    little = row("little", 0.03, [98.0, 101.0, 104.0], memory=300 * MB)
    found = recommend(ledger(quick, little), by_speed())
    assert found.choice is not None
    assert (picked(found), found.choice.by) == ("little", "memory")
    assert [one.candidate.row.id for one in found.choice.tied] == ["quick"]
    assert found.choice.before == ("throughput",)
    # With repetitions that agree the same medians would be told apart if they were 4 % apart.
    steadily = [row("quick", 0.03, steady(106.0)), row("little", 0.002, steady(101.0))]
    sure = recommend(ledger(*steadily), by_speed())
    assert sure.choice is not None
    assert (picked(sure), sure.choice.by, sure.choice.tied) == ("quick", "throughput", ())


def test_memories_as_large_are_decided_by_drift_unless_both_are_equivalent() -> None:
    rows = [
        row("far", 0.03, steady(100.0), memory=400 * MB),
        row("near", 0.002, steady(100.0), memory=419 * MB),
    ]
    equivalent = recommend(ledger(*rows), by_speed())
    assert equivalent.choice is not None
    assert equivalent.choice.by == "nothing"
    made = ledger(*rows)
    pairs = [one for one in made.comparisons if one.measure != "ppl"]
    found = recommend(made.model_copy(update={"comparisons": pairs}), by_speed())
    assert found.choice is not None
    assert (picked(found), found.choice.by) == ("near", "drift")
    assert found.choice.before == ("throughput", "memory")
    # A twentieth more memory is more.
    rows[1] = row("near", 0.002, steady(100.0), memory=421 * MB)
    assert picked(recommend(ledger(*rows), by_speed())) == "far"


def test_each_profile_puts_another_thing_first() -> None:
    """Three that are each the best in one thing, and one that loses too much for any."""
    small = row("small", 0.09, steady(50.0), memory=200 * MB)
    fast = row("fast", 0.045, steady(200.0), memory=900 * MB)
    near = row("near", 0.001, steady(60.0), memory=500 * MB)
    far = row("far", 0.2, steady(400.0), memory=100 * MB)
    made = ledger(small, fast, near, far)
    # log(1.10), log(1.05) and log(1.01), for the tolerance is 1 %.
    bounds = {"laptop": 0.09531, "server": 0.04879, "quality": 0.00995}
    for profile, pick in (("laptop", "small"), ("server", "fast"), ("quality", "near")):
        (found,) = [one for one in profiles(made) if one.profile == profile]
        assert picked(found) == pick
        (limit,) = found.limits
        assert limit.bound == pytest.approx(bounds[profile], abs=1e-5)
        assert limit.is_default
    assert recommend(made).profile == "laptop"
    with_gpu = made.environment.model_copy(update={"gpu": "H100"})
    assert recommend(made.model_copy(update={"environment": with_gpu})).profile == "server"


def test_the_default_limit_follows_the_tolerance_of_the_run() -> None:
    made = ledger(FAST)
    pairs = [one.model_copy(update={"tolerance": 2.0}) if one.measure == "ppl" else one
             for one in made.comparisons]  # fmt: skip
    (limit,) = recommend(made.model_copy(update={"comparisons": pairs})).limits
    assert limit.bound == pytest.approx(0.18232, abs=1e-5)  # log(1.20)
    assert limit.because == "20 % more perplexity"


def test_a_laptop_is_one_person_and_a_server_is_many() -> None:
    one, many = (
        row(name, 0.01, steady(50.0)).model_copy(
            update={"bench": [loads.bench(LLAMACPP, n, steady(rate)) for n, rate in rates]}
        )
        for name, rates in (("one", ((1, 90.0), (4, 100.0))), ("many", ((1, 30.0), (4, 200.0))))
    )
    found = {one.profile: one for one in profiles(ledger(one, many))}
    assert (found["laptop"].concurrency, picked(found["laptop"])) == (1, "one")
    assert (found["server"].concurrency, picked(found["server"])) == (4, "many")


def test_a_server_goes_by_goodput_where_an_objective_was_searched_for() -> None:
    quick = row("quick", 0.01, steady(200.0))
    prompt = row("prompt", 0.01, steady(100.0))
    rates = {"quick": (0.5, 0.6), "prompt": (1.0, 1.1)}
    rows = [
        one.model_copy(update={"goodput": [loads.goodput(LLAMACPP, *rates[one.id])]})
        for one in (quick, prompt)
    ]
    found = recommend(ledger(*rows), by_speed())
    assert found.choice is not None
    assert (picked(found), found.choice.by) == ("prompt", "goodput")


def test_quality_takes_the_smaller_of_two_that_are_equivalent() -> None:
    large = row("large", 0.001, steady(100.0), memory=900 * MB)
    little = row("little", 0.003, steady(50.0), memory=300 * MB)
    found = recommend(ledger(large, little), Wants(profile="quality"))
    assert found.choice is not None
    assert (picked(found), found.choice.by) == ("little", "memory")
    made = ledger(large, little)
    pairs = [one.model_copy(update={"verdict": "undecided"})
             if one.measure == "ppl" and "little" in (one.a, one.b) else one
             for one in made.comparisons]  # fmt: skip
    found = recommend(made.model_copy(update={"comparisons": pairs}), Wants(profile="quality"))
    assert found.choice is not None
    assert (picked(found), found.choice.by) == ("large", "drift")


def test_two_engines_of_one_variant_are_two_candidates() -> None:
    both = FAST.model_copy(
        update={"bench": [loads.bench(LLAMACPP, 4, steady(90)), loads.bench(VLLM, 4, steady(120))]}
    )
    found = recommend(ledger(both), by_speed())
    assert found.pick is not None
    assert found.runner_up is not None
    assert found.pick.candidate.key == ("fast", "vllm")
    assert found.runner_up.candidate.key == ("fast", "llamacpp")
    assert recommend(ledger(both), by_speed(engine="llamacpp")).assessed[0].candidate.engine == (
        "llamacpp"
    )
    with pytest.raises(RecipeError, match=r"engine 'vlm': .*did you mean 'vllm'"):
        recommend(ledger(both), by_speed(engine="vlm"))


def test_a_limit_inside_an_interval_is_undecided_and_nobody_is_shipped_by_it() -> None:
    unsure = row("unsure", 0.05, steady(300.0), error=0.002)  # 0.046 to 0.054
    found = recommend(ledger(unsure, NEAR), by_speed(max_kld=0.05))
    assert states(found, "unsure") == {"max-kld": "undecided"}
    assert picked(found) == "near"
    assert [one.candidate.row.id for one in found.open] == ["unsure"]
    alone = recommend(ledger(unsure), by_speed(max_kld=0.05))
    assert alone.pick is None
    assert [one.candidate.row.id for one in alone.open] == ["unsure"]
    slow = row("slow", 0.05, steady(30.0), error=0.002)
    assert recommend(ledger(slow, NEAR), by_speed(max_kld=0.05)).open == ()


def test_nothing_fits_and_what_would_have_to_give() -> None:
    found = recommend(FOUR, by_speed(max_memory=100 * MB, max_kld=0.05))
    assert found.pick is None
    assert found.runner_up is None
    (binding,) = found.loosened  # no bound on drift alone helps
    assert (binding.limit.bound, binding.pick.candidate.row.id) == (200 * MB, "small")


def test_the_reference_is_shipped_only_where_no_quantized_variant_fits() -> None:
    found = ledgers.quickstart()
    bench = [loads.bench(VLLM, 4, steady(500.0))]
    reference = found.variants[0].model_copy(update={"bench": bench})
    same = row("f16", 0.0, steady(400.0), memory=MB).model_copy(update={"spec": "gguf:F16"})
    rows = [reference, same, FAST]
    made = ledgers.with_pairs(found.model_copy(update={"variants": rows}))
    for profile in PROFILES:
        one = recommend(made, Wants(profile=profile, max_kld=0.05))
        assert (picked(one), one.runner_up) == ("fast", None)
        assert plain(advice(made, one).ship) == "Ship fast on llamacpp."
        none = recommend(made, Wants(profile=profile, max_kld=0.0))
        assert picked(none) == "reference"  # of f16's divergence it is not known to be 0
    assert plain(advice(made, recommend(made, by_speed(max_kld=0.0))).ship) == (
        "Ship reference on vllm: no quantized variant is known to be within the limits."
    )
    alone = made.model_copy(update={"variants": rows[:2]})
    assert "no quantized variant was benched" in plain(advice(alone, recommend(alone)).ship)


def test_drop_is_the_paired_interval_of_each_task() -> None:
    """gguf-Q8_0 lost 0 points of 282 questions, the interval is +-2.1."""
    for points, state in ((1.0, "undecided"), (2.5, "met")):
        found = recommend(ledgers.quickstart(), by_speed(max_drop=points))
        assert states(found, "gguf-Q8_0") == {"max-drop (mmlu)": state}
    lost = [
        pair.model_copy(update={"drift": -6.0, "low": -8.0, "high": -4.0})
        if (pair.measure, pair.b) == ("mmlu_acc", "gguf-Q8_0") and pair.a == "reference"
        else pair
        for pair in ledgers.quickstart().comparisons
    ]
    made = ledgers.quickstart().model_copy(update={"comparisons": lost})
    found = recommend(made, by_speed(max_drop=3.9))
    assert states(found, "gguf-Q8_0") == {"max-drop (mmlu)": "excluded"}


def test_what_is_missing_is_named_and_not_recommended() -> None:
    broken = FAST.model_copy(
        update={"id": "broken", "failed": Failure(stage="evaluate", error="it died")}
    )
    unbenched = FAST.model_copy(update={"id": "unbenched", "bench": []})
    unmeasured = FAST.model_copy(update={"id": "unmeasured", "texts": {}, "metrics": {}})
    lower = FAST.model_copy(
        update={"id": "lower", "bench": [loads.bench(LLAMACPP, 1, steady(999.0))]}
    )
    found = recommend(ledger(broken, unbenched, unmeasured, lower, SMALL), by_speed())
    assert picked(found) == "small"
    reasons = {one.id: one.reason for one in found.missing}
    assert reasons == {
        "reference": "was not benched",
        "broken": "failed in evaluate",
        "unbenched": "was not benched",
        "unmeasured": "what it lost was not measured",
        "lower on llamacpp": "no bench at 4 requests at a time",
    }
    with pytest.raises(EvaluationError, match="nothing to recommend"):
        recommend(ledger(broken, unbenched), by_speed())
    with pytest.raises(RecipeError, match="concurrency 2: this run benched 1, 4 requests"):
        recommend(ledger(lower, SMALL), by_speed(concurrency=2))


def test_a_bench_that_failed_on_one_engine_does_not_take_the_other_away() -> None:
    died = FAST.model_copy(update={"failed": Failure(stage="bench", error="vllm: it died")})
    found = recommend(ledger(died, NEAR), by_speed())
    assert picked(found) == "fast"
    assert (
        "what was measured before counts" in {one.id: one.reason for one in found.missing}["fast"]
    )
    # A sweep that was broken off did not level off.
    far = row("far", 0.01, steady(50.0)).model_copy(
        update={"bench": [loads.bench(LLAMACPP, n, steady(30.0 + n)) for n in (4, 16)]}
    )
    swept = {"recipe": {"bench": {"concurrency": "auto"}}}
    assert picked(recommend(ledger(died, far).model_copy(update=swept), by_speed())) == "far"
    assert picked(recommend(ledger(FAST, far).model_copy(update=swept), by_speed())) == "fast"


def test_limits_on_what_the_run_did_not_measure_are_refused() -> None:
    ppl = {DOCS: OnText(metrics={"ppl": FAST.texts[DOCS].metrics["ppl"]})}
    bare = [one.model_copy(update={"texts": ppl, "metrics": {}}) for one in (FAST, NEAR)]
    found = ledgers.quickstart()
    reference = found.variants[0].model_copy(update={"texts": {}, "metrics": {}, "bench": []})
    made = found.model_copy(update={"variants": [reference, *bare], "comparisons": []})
    wants = Wants(profile="server")
    assert picked(recommend(made, wants)) == "fast"  # and no limit on drift: there is none to know
    assert recommend(made, wants).limits == ()
    for wants in (Wants(max_kld=0.1), Wants(max_drop=1.0)):
        with pytest.raises(RecipeError, match="this run"):
            recommend(made, wants)


def test_nothing_is_recommended_of_which_nobody_knows_what_it_lost() -> None:
    bare = [one.model_copy(update={"texts": {}, "metrics": {}}) for one in (FAST, NEAR)]
    made = ledger(*bare).model_copy(update={"comparisons": []})
    with pytest.raises(EvaluationError, match="what the variants lost was not measured; give the"):
        recommend(made, by_speed())
    assert by_default(made) is None


def test_a_sweep_that_levelled_off_counts_at_more_requests() -> None:
    """Only a sweep that ended by itself: there, more requests bring no more tokens."""
    early = row("early", 0.01, steady(100.0))
    late = row("late", 0.01, steady(50.0)).model_copy(
        update={"bench": [loads.bench(LLAMACPP, n, steady(30.0 + n)) for n in (4, 16)]}
    )
    made = ledger(early, late)
    assert picked(recommend(made, by_speed())) == "late"
    swept = made.model_copy(update={"recipe": {"bench": {"concurrency": "auto"}}})
    assert picked(recommend(swept, by_speed())) == "early"


def test_intervals_of_repetitions() -> None:
    # Student's t at 2 degrees of freedom is 4.3027; s = 5, so 4.3027 * 5 / sqrt(3) = 12.42.
    found = of_repetitions([95.0, 100.0, 105.0])
    assert (found.low, found.high) == pytest.approx((87.58, 112.42), abs=0.01)
    # One run: it touches another exactly where that is a tenth lower.
    one, other = of_repetitions([100.0]), of_repetitions([90.0])
    assert one.low == pytest.approx(other.high)
    assert not of_repetitions([100.0]).overlaps(of_repetitions([89.9]))
    ratio = Interval(100.0, 90.0, 110.0).over(Interval(50.0, 40.0, 60.0))
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 1.5, 2.75)


def on_code(row: Row, kld: float, error: float = 0.0001) -> Row:
    """The row, with this divergence on a second text."""
    mean = row.texts[DOCS].metrics["kld_mean"].model_copy(update={"value": kld, "stderr": error})
    return row.model_copy(update={"texts": row.texts | {CODE: OnText(metrics={"kld_mean": mean})}})


def of_two_texts(*rows: Row) -> Ledger:
    """Without paired tests: intervals decide."""
    found = ledger(*rows)
    texts = [found.texts[0], found.texts[0].model_copy(update={"name": CODE})]
    return found.model_copy(update={"texts": texts, "comparisons": []})


def test_the_limit_on_drift_holds_on_the_worst_text_unless_the_mean_is_asked_for() -> None:
    """On average 0.045 nats, which the default limit of 0.05 allows; on code 0.08."""
    uneven = on_code(row("fast", 0.01, steady(200.0)), 0.08)
    even = on_code(row("near", 0.001, steady(100.0)), 0.04)
    made = of_two_texts(uneven, even)
    found = recommend(made, by_speed())
    assert picked(found) == "near"
    (check,) = next(one for one in found.assessed if one.candidate.row.id == "fast").checks
    assert (check.state, check.text, check.said) == (
        "excluded", CODE, "KL divergence on stdlib:code",
    )  # fmt: skip
    said = advice(made, found)
    assert plain(said.limits).startswith("KL divergence on the worst text at most 0.0500 nats")
    assert "KL divergence on stdlib:code 0.0800 nats" in plain(said.excluded[0])
    assert picked(recommend(made, by_speed(drift="mean"))) == "fast"
    (check,) = recommend(made, by_speed(drift="mean")).assessed[0].checks
    assert check.measured is not None
    assert check.measured.value == pytest.approx((0.01 + 0.08) / 2)
    # Of two independent errors of 0.0001 each.
    half = 1.959964 * 0.0001 * 2**0.5 / 2
    assert check.measured.high - check.measured.value == pytest.approx(half)
    assert check.said == "KL divergence on average over the texts"


def test_what_may_exceed_the_limit_on_any_text_is_not_known_to_meet_it() -> None:
    """The worst value is clear, and another text's interval reaches over the limit."""
    one = on_code(row("one", 0.045, steady(100.0), error=0.0001), 0.04, error=0.01)
    assert states(recommend(of_two_texts(one), by_speed()), "one") == {"max-kld": "undecided"}


def test_nearness_goes_by_the_paired_test_on_ones_own_worst_text() -> None:
    """Intervals of the two overlap on each text; only the paired tests tell them apart."""
    a, b = (on_code(row(name, 0.02, steady(100.0), error=0.01), 0.03, error=0.01) for name in "ab")
    made = of_two_texts(a, b)
    assert not Nearness(made).nearer(a, b)

    def pair(text: str, drift: float, p: float) -> Comparison:
        like = next(c for c in ledgers.quickstart().comparisons if c.measure == "kld_mean")
        update = {"text": text, "a": "a", "b": "b", "drift": drift, "p_adjusted": p}
        return like.model_copy(update=update)

    code = made.model_copy(update={"comparisons": [pair(DOCS, -1, 0.5), pair(CODE, 0.001, 0.01)]})
    assert Nearness(code).nearer(a, b)
    assert not Nearness(code).nearer(b, a)
    # On the mean it must be nearer on every text.
    assert not Nearness(code, "mean").nearer(a, b)
    both = [pair(DOCS, 0.001, 0.01), pair(CODE, 0.001, 0.01)]
    assert Nearness(made.model_copy(update={"comparisons": both}), "mean").nearer(a, b)
    other = made.model_copy(update={"comparisons": [pair(DOCS, 0.001, 0.01), pair(CODE, 1, 0.5)]})
    assert not Nearness(other).nearer(a, b)
