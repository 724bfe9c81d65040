# ruff: noqa: RUF001 (the report writes a real minus sign)
from __future__ import annotations

import math

from quantkit.ledger import Ledger
from quantkit.ledger.drift import SubjectDrift
from quantkit.models.variant import KindRecord
from quantkit.reports import texts
from quantkit.reports.cautions import cautions
from quantkit.reports.charts import drift_chart
from quantkit.reports.drifts import profiles, verdicts
from quantkit.reports.findings import compared, findings, headlines
from quantkit.reports.method import measured
from quantkit.reports.prose import Name, listing, plain
from quantkit.reports.table import by_text, everything, table
from tests import ledger_rows, ledgers


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
    assert answers["Nearest to the reference"][0] == "gguf-Q8_0"
    # 91,727,904 of 269,060,552 bytes are 34.1 %.
    assert answers["Smallest on disk"] == ("gguf-Q4_0", "91.7 MB, 34 % of the reference's 269 MB")
    # 131.4 and 139.2, 6 % to each side: neither is called faster than the other.
    fastest = answers["Fastest with 4 requests at a time"]
    assert fastest[0] == "gguf-Q4_0 on llamacpp"
    assert fastest[1].endswith("; gguf-Q4_K_M on llamacpp cannot be told from it")


def test_divergence_ranks_only_what_the_windows_tell_apart() -> None:
    text = said(ledgers.quickstart())["KL divergence"]
    assert "gptq-w4g64 and awq-w4g64 (0.03880 ± 0.00060 to 0.03950 ± 0.00060, not told" in text
    order = [text.index(id_) for id_ in ("gguf-Q8_0", "gguf-Q4_K_M", "gptq-w4g64", "gguf-Q4_0 ")]
    assert order == sorted(order)


def test_perplexity_names_who_is_worse_and_who_is_equivalent() -> None:
    assert said(ledgers.quickstart())["Perplexity"] == (
        "Worse than the reference: gguf-Q4_K_M (+2.57 %), gguf-Q4_0 (+12.5 %), gptq-w4g64 "
        "(+3.47 %), awq-w4g64 (+3.63 %). Equivalent to the reference, within ±1 %: gguf-Q8_0 "
        "(+0.04 %)."
    )


def test_accuracy_says_what_it_cannot_see() -> None:
    text = said(ledgers.quickstart())["MMLU"]
    assert text.startswith("Undecided: gguf-Q8_0 (0.0 points), gguf-Q4_K_M (−1.1 points)")
    assert "To decide would take some 3,400 to 42,000 more questions than these 282." in text
    # 84 of 282 right are 29.8 %, guessing gives 25 ± 5.4 %.
    assert "cannot be told from guessing" in text


def test_verdicts_have_a_line_a_variant_with_its_flips() -> None:
    perplexity, mmlu = verdicts(ledgers.quickstart())
    assert (perplexity.title, perplexity.items, perplexity.tolerance) == (
        "Perplexity", "80 windows", "1 %",
    )  # fmt: skip
    assert [line.verdict for line in perplexity.lines] == [
        "equivalent", "worse", "worse", "worse", "worse",
    ]  # fmt: skip
    assert perplexity.lines[1].p == "< 0.001"
    assert plain(perplexity.groups) == (
        "The data tell these groups apart, from the lowest value up: reference and gguf-Q8_0; "
        "gguf-Q4_K_M; gptq-w4g64 and awq-w4g64; gguf-Q4_0. Nothing is ranked inside a group."
    )
    third = mmlu.lines[2]
    assert (third.drift, third.flips, third.more) == (
        "−1.8 points", (17, 12, 16), "some 4,400 more questions",
    )  # fmt: skip
    assert "In none of the 57 subjects" in plain(mmlu.subjects)


def test_a_subject_that_fell_is_named() -> None:
    ledger = ledgers.quickstart()
    law = SubjectDrift(subject="law", n=40, right_to_wrong=12, wrong_to_right=1, p_adjusted=0.02)
    changed = [
        pair.model_copy(update={"changed_subjects": [law]})
        if (pair.measure, pair.a, pair.b) == ("mmlu_acc", "reference", "awq-w4g64")
        else pair
        for pair in ledger.comparisons
    ]
    mmlu = verdicts(ledger.model_copy(update={"comparisons": changed}))[1]
    assert plain(mmlu.subjects) == (
        "Beyond chance among 57 subjects (Holm over the subjects): awq-w4g64 in law (12 of 40 "
        "lost, 1 won)."
    )


def test_profiles_have_a_row_a_variant() -> None:
    (found,) = profiles(ledgers.quickstart())
    assert found.positions[0] == "256 to 319"
    assert found.confidences[-1] == "95 to 100 %"
    id_, cells = found.rows[1]
    assert id_ == "gguf-Q4_K_M"
    assert (cells[0], cells[-1]) == ("0.025", "0.0072")  # 0.0241 x 1.04 and x 0.3
    assert profiles(ledgers.unmeasured()) == []


def test_throughput_is_set_against_the_reference() -> None:
    text = said(ledgers.quickstart())["Throughput, 1 request at a time"]
    assert "71.0 (66.6 to 75.4) output tokens/s at the most; their intervals overlap" in text
    # 71.0 / 27.9 = 2.54, and 66.6 / 29.6 to 75.4 / 26.2
    assert text.endswith("That is 2.5 (2.2 to 2.9) times the reference on vllm.")


def test_a_reference_that_is_fastest_is_named() -> None:
    ledger = ledgers.quickstart()
    quick = [ledger_rows.bench(ledger_rows.VLLM, load, 999.0, 9.0) for load in (1, 4)]
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
    ppl = ledger_rows.metric(5.0, 0.1, protocol={"context": 2048})
    row = ledger_rows.with_metrics(ledger.variants[1], ppl=ppl)
    ledger = ledgers.with_row(ledger, 1, texts=row.texts)
    assert column(ledger, "Perplexity", "drift")[1] == "–"
    assert "gguf-Q8_0" not in said(ledger)["Perplexity"]
    assert "another protocol than the reference, so not compared with it: gguf-Q8_0: ppl" in warned(
        ledger
    )


def test_what_is_not_finite_is_shown_and_not_ranked() -> None:
    ledger = ledgers.quickstart()
    kld = ledger_rows.metric(math.nan, 0.1)
    row = ledger_rows.with_metrics(ledger.variants[3], kld_mean=kld)
    ledger = ledgers.with_row(ledger, 3, texts=row.texts)
    assert column(ledger, "Drift from the reference", "KLD mean")[3] == "not finite"
    assert "gguf-Q4_0" not in said(ledger)["KL divergence"]
    assert "Not finite, so left out of every comparison: gguf-Q4_0: kld_mean." in warned(ledger)


def test_cautions_of_the_demo_and_of_a_gap() -> None:
    text = warned(ledgers.quickstart())
    assert "different parts of one dataset" in text
    assert "from 24 to 96 requests" in text
    assert "different engines" in text
    assert (
        "scored by transformers 5.19.0, another engine than that of gguf-Q8_0, gguf-Q4_K_M and "
        "gguf-Q4_0;" in text
    )
    assert "Not everything" not in text
    assert "Not everything was measured for gptq-w4g64." in warned(ledgers.without_bench())


def test_the_caution_of_a_mix_counts_the_samples_of_the_evaluations_dataset() -> None:
    ledger = ledgers.quickstart()
    assert ledger.calibration is not None
    text = ledger.texts[0].model_copy(update={"dataset": "pydoc:evaluation"})

    def mixed(*datasets: str) -> str:
        kinds = [
            KindRecord(kind=name, dataset=name, revision=None, share=0.5, samples=16)
            for name in datasets
        ]
        given = {"dataset": "mix", "revision": None, "kinds": kinds}
        record = ledger.calibration.model_copy(update=given)
        return warned(ledger.model_copy(update={"calibration": record, "texts": [text]}))

    alike = "16 of 32 calibration samples are from the evaluation text's own dataset."
    assert alike in mixed("pydoc:calibration", "stdlib:calibration")
    assert "dataset" not in mixed("packages:web", "stdlib:calibration")


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
    assert perplexity.engines == [str(ledger_rows.TRANSFORMERS), str(ledger_rows.LLAMACPP)]
    assert divergence.ways[0].n == 20_400


def test_listing() -> None:
    assert plain(listing(["a"])) == "a"
    assert listing(["a", "b", "c"]) == (Name("a"), ", ", Name("b"), " and ", Name("c"))


def test_several_texts_name_the_worst_and_mark_what_is_like_the_calibration() -> None:
    ledger = ledgers.two_texts()
    found = said(ledger)
    assert (
        "gptq-w4g64 0.07760 ± 0.00095 nats on average, worst 0.1164 ± 0.0018 on stdlib:code;"
        in (found["Drift on 2 texts"])
    )
    assert found["Drift on 2 texts"].endswith("pydoc:evaluation is like the calibration.")
    # 0.0388 on the calibration's own kind and 0.1164 on code: another order on each.
    alike = found["KL divergence on pydoc:evaluation, like the calibration"]
    assert alike.index("gptq-w4g64") < alike.index("awq-w4g64")
    code = found["KL divergence on stdlib:code"]
    assert code.index("awq-w4g64") < code.index("gptq-w4g64")
    assert "gptq-w4g64 (+10.8 %)" in found["Perplexity on stdlib:code"]
    nearest = headlines(ledger)[0]
    assert plain(nearest.answer) == "gguf-Q8_0"
    assert "nats on average, worst 0.001222 ± 0.000026 on stdlib:code" in plain(nearest.evidence)
    assert "the drift on stdlib:code is not affected" in warned(ledger)
    assert "of one kind" not in warned(ledger)


def test_the_table_of_several_texts_has_their_mean_and_the_worst() -> None:
    ledger = ledgers.two_texts()
    group = "Drift on 2 texts"
    assert column(ledger, group, "KLD, mean of texts")[4] == "0.07760"  # (0.0388 + 0.1164) / 2
    assert column(ledger, group, "KLD, worst text")[4:] == ["0.1164", "0.03950"]
    assert column(ledger, group, "perplexity, worst")[4] == "+10.8 %"
    whole = by_text(ledger)
    assert whole is not None
    assert [title for title, _ in whole.groups] == [
        "pydoc:evaluation, like the calibration", "stdlib:code",
    ]  # fmt: skip
    assert by_text(ledgers.quickstart()) is None
    names, rows = everything(ledger)
    assert names.count("stdlib:code kld_mean") == names.count("pydoc:evaluation kld_mean") == 1
    (gptq,) = (cells for id_, cells in rows if id_ == "gptq-w4g64")
    assert gptq[names.index("stdlib:code kld_mean")].text == "0.1164"


def test_each_text_has_verdicts_and_a_profile() -> None:
    ledger = ledgers.two_texts()
    assert [one.title for one in verdicts(ledger)] == [
        "Perplexity on pydoc:evaluation, like the calibration", "Perplexity on stdlib:code", "MMLU",
    ]  # fmt: skip
    assert [one.text for one in profiles(ledger)] == ["pydoc:evaluation", "stdlib:code"]


def test_the_chart_of_several_texts_has_a_line_for_each_in_a_row() -> None:
    chart = drift_chart(ledgers.two_texts())
    assert chart is not None
    divergence = chart.panels[0]
    means = [mark for mark in divergence.marks if mark.kind == "mean"]
    assert [mark.series for mark in means] == [0, 1] * 5
    row = means[6:8]  # gptq: three times as far on code, on the same scale
    assert row[0].x < row[1].x
    assert row[0].y < row[1].y
    assert all(mark.span and mark.span[0] < mark.x < mark.span[1] for mark in means)
    assert row[1].words.endswith("on stdlib:code")
    assert [text for *_, text in chart.key[3:]] == [
        "pydoc:evaluation, like the calibration", "stdlib:code",
    ]  # fmt: skip
    mmlu = chart.panels[-1]  # of no text: in the middle of its row
    assert {mark.series for mark in mmlu.marks} == {0}
    assert mmlu.marks[0].y == chart.names[0].y


def test_the_mark_says_how_much_of_a_mix_is_alike() -> None:
    ledger = ledgers.two_texts()
    assert ledger.calibration is not None
    kinds = [
        KindRecord(kind=name, dataset=name, revision=None, share=share, samples=samples)
        for name, share, samples in (("stdlib:calibration", 0.25, 8), ("packages:web", 0.75, 24))
    ]
    record = ledger.calibration.model_copy(update={"dataset": "mix", "kinds": kinds})
    ledger = ledger.model_copy(update={"calibration": record})
    assert texts.title(ledger, "stdlib:code") == "stdlib:code, like 25 % of the calibration"
    assert texts.title(ledger, "pydoc:evaluation") == "pydoc:evaluation"
    assert "8 of stdlib:code's own dataset" in warned(ledger)
