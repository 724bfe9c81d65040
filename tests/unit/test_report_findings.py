# ruff: noqa: RUF001 (the report writes a real minus sign)
from __future__ import annotations

import math

from quantkit.ledger import Ledger
from quantkit.report.cautions import cautions
from quantkit.report.findings import compared, findings, headlines
from quantkit.report.method import measured
from quantkit.report.prose import Name, listing, plain
from quantkit.report.table import table
from tests import ledgers


def said(ledger: Ledger) -> dict[str, str]:
    return {finding.about: plain(finding.text) for finding in findings(ledger)}


def warned(ledger: Ledger) -> str:
    return "\n".join(plain(caution) for caution in cautions(ledger))


def column(ledger: Ledger, group: str, title: str) -> list[str]:
    columns = table(ledger).columns
    found = next(c for c in columns if (c.group, c.title) == (group, title))
    return [cell.text for cell in found.cells]


def test_headlines_of_the_demo() -> None:
    found = headlines(ledgers.quickstart())
    answers = {one.question: (plain(one.answer), plain(one.evidence)) for one in found}
    assert answers["Nearest to the original"][0] == "gguf-Q8_0"
    # 91,727,904 of 269,060,552 bytes are 34.1 %.
    assert answers["Smallest on disk"] == ("gguf-Q4_0", "91.7 MB, 34 % of the original's 269 MB")
    # 131.4 is less than a tenth below 139.2: neither is called faster than the other.
    fastest = answers["Fastest with 4 requests at a time"]
    assert fastest[0] == "gguf-Q4_0 and gguf-Q4_K_M on llamacpp"
    assert "not ranked" in fastest[1]


def test_divergence_ranks_only_what_the_noise_allows() -> None:
    # 0.0388 and 0.0395 are 0.0007 apart; 1.96 x hypot(0.0006, 0.0006) is 0.0017.
    text = said(ledgers.quickstart())["KL divergence"]
    assert "gptq-w4g64 and awq-w4g64 (0.03880 ± 0.00060 to 0.03950 ± 0.00060, not told" in text
    order = [text.index(id_) for id_ in ("gguf-Q8_0", "gguf-Q4_K_M", "gptq-w4g64", "gguf-Q4_0 ")]
    assert order == sorted(order)


def test_perplexity_names_who_differs_and_who_does_not() -> None:
    # 24.1034 - 21.4312 = 2.67 against 1.96 x hypot(0.3591, 0.3127) = 0.93; the others are inside.
    assert said(ledgers.quickstart())["Perplexity"] == (
        "Different from the original: gguf-Q4_0 (+12.5 %). Indistinguishable from the original: "
        "gguf-Q8_0, gguf-Q4_K_M, gptq-w4g64 and awq-w4g64."
    )


def test_accuracy_says_what_it_cannot_see() -> None:
    text = said(ledgers.quickstart())["MMLU"]
    assert text.startswith("Indistinguishable from the original: gguf-Q8_0")
    # 1.96 x sqrt(2) x 2.73 % = 7.6 points; 84 of 282 right are 29.8 %, guessing gives 25 ± 5.4 %.
    assert "only differences above some 7.6 points show" in text
    assert "cannot be told from guessing" in text


def test_throughput_is_set_against_the_reference() -> None:
    text = said(ledgers.quickstart())["Throughput, 1 request at a time"]
    assert "71.0 output tokens/s at the most" in text
    assert text.endswith("That is 2.5 times the reference on vllm.")  # 71.0 / 27.9 = 2.54


def test_a_reference_that_is_fastest_is_named() -> None:
    ledger = ledgers.quickstart()
    quick = [ledgers.bench(ledgers.VLLM, load, 999.0, 9.0) for load in (1, 4)]
    headline = headlines(ledgers.with_row(ledger, 0, bench=quick))[-1]
    assert plain(headline.answer) == "reference on vllm"


def test_a_failed_row_is_named_and_keeps_its_place() -> None:
    ledger = ledgers.failed()
    assert said(ledger)["Failed"] == "awq-w4g64 at convert. The table has the reason."
    assert table(ledger).rows[5].id == "awq-w4g64"
    assert column(ledger, "Perplexity", "value")[5] == "–"


def test_drift_columns() -> None:
    ledger = ledgers.quickstart()
    assert column(ledger, "Perplexity", "drift") == [
        "–", "+0.04 %", "+2.57 %", "+12.5 %", "+3.47 %", "+3.63 %",
    ]  # fmt: skip
    assert column(ledger, "MMLU", "drift") == [
        "–", "0.0 pt", "−1.1 pt", "−1.8 pt", "+0.7 pt", "−0.7 pt",
    ]  # fmt: skip


def test_other_protocols_give_no_drift_and_a_caution() -> None:
    ledger = ledgers.quickstart()
    metrics = dict(ledger.variants[1].metrics)
    metrics["ppl"] = ledgers.metric(5.0, 0.1, protocol={"context": 2048})
    ledger = ledgers.with_row(ledger, 1, metrics=metrics)
    assert column(ledger, "Perplexity", "drift")[1] == "–"
    assert "gguf-Q8_0" not in said(ledger)["Perplexity"]
    assert "another protocol than the reference, so not compared with it: gguf-Q8_0: ppl" in warned(
        ledger
    )


def test_what_is_not_finite_is_shown_and_not_ranked() -> None:
    ledger = ledgers.quickstart()
    metrics = dict(ledger.variants[3].metrics)
    metrics["kld_mean"] = metrics["kld_mean"].model_copy(update={"value": math.nan})
    ledger = ledgers.with_row(ledger, 3, metrics=metrics)
    assert column(ledger, "Drift from the reference", "KLD mean")[3] == "not finite"
    assert "gguf-Q4_0" not in said(ledger)["KL divergence"]
    assert "Not finite, so left out of every comparison: gguf-Q4_0: kld_mean." in warned(ledger)


def test_cautions_of_the_demo_and_of_a_gap() -> None:
    text = warned(ledgers.quickstart())
    assert "different parts of one dataset" in text
    assert "one run of 8 to 32 requests" in text
    assert "different engines" in text
    assert (
        "scored by transformers 5.19.0, another engine than that of gguf-Q8_0, gguf-Q4_K_M and "
        "gguf-Q4_0;" in text
    )
    assert "Not everything" not in text
    assert "Not everything was measured for gptq-w4g64." in warned(ledgers.without_bench())


def test_nothing_measured_gives_no_claims() -> None:
    ledger = ledgers.unmeasured()
    assert [h.question for h in headlines(ledger)] == ["Smallest on disk"]
    assert findings(ledger) == []
    assert measured(ledger) == []
    assert plain(compared(ledger)).endswith("(safetensors:bf16).")


def test_measured_puts_equal_protocols_together() -> None:
    perplexity, divergence, *_ = measured(ledgers.quickstart())
    assert [way.ids for way in perplexity.ways] == [
        ("reference", "gguf-Q8_0", "gguf-Q4_K_M", "gguf-Q4_0", "gptq-w4g64", "awq-w4g64")
    ]
    assert perplexity.engines == [ledgers.TRANSFORMERS, ledgers.LLAMACPP]
    assert divergence.ways[0].n == 20_400


def test_listing() -> None:
    assert plain(listing(["a"])) == "a"
    assert listing(["a", "b", "c"]) == (Name("a"), ", ", Name("b"), " and ", Name("c"))
