"""The command line: what it says, on which stream, with which exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ledgers


def quantkit(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quantkit", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        check=False,
    )


def _fails(code: int, message: str, *arguments: str | Path, **environment: str) -> None:
    """It ends with ``code`` and one line on stderr that matches; nothing on stdout."""
    ended = quantkit(*arguments, **environment)
    assert ended.returncode == code, ended.stderr
    assert re.search(message, ended.stderr), ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert ended.stdout == ""


@pytest.fixture(scope="module")
def variant(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli")
    ended = quantkit("convert", tiny_llama, "--to", "gguf:Q8_0", "--out", out, "--json")
    assert ended.returncode == 0, ended.stderr
    (made,) = json.loads(ended.stdout)
    assert made["id"] == "gguf-Q8_0"
    return Path(made["path"])


def test_inspect_and_verify(variant: Path, tiny_llama: Path) -> None:
    facts = json.loads(quantkit("inspect", tiny_llama, "--json").stdout)
    assert (facts["kind"], facts["dtype"]) == ("checkpoint", "bf16")
    facts = json.loads(quantkit("inspect", variant, "--json").stdout)
    assert (facts["kind"], facts["scheme"]) == ("variant", "Q8_0")
    manifest = facts["manifest"]
    (digest, *_) = manifest["source"]["sha256"].values()
    page = quantkit("inspect", variant).stdout
    assert re.search(rf"^  source +{manifest['source']['id']}$", page, re.MULTILINE)
    assert re.search(r"^  made by +native: quantkit ", page, re.MULTILINE)
    assert re.search(
        r"^  bits per weight +8\.\d+; 8\.5\d* in the quantized layers$", page, re.MULTILINE
    )
    assert "Oddities\n  none" in page
    assert digest not in page
    assert digest in quantkit("inspect", variant, "--all").stdout
    (bare,) = variant.glob("*.gguf")
    copy = variant.parent / "bare.gguf"
    copy.write_bytes(bare.read_bytes())
    facts = json.loads(quantkit("inspect", copy, "--json").stdout)
    assert (facts["kind"], facts["scheme"]) == ("weights without a manifest", "Q8_0")

    assert quantkit("verify", variant).returncode == 0
    (variant / "stray").write_text("x")
    ended = quantkit("verify", variant, "--json")
    assert ended.returncode == 1
    assert json.loads(ended.stdout)["problems"] == ["stray: not in the manifest"]
    (variant / "stray").unlink()


def test_recommend_prints_and_exits_by_whether_anything_fits(tmp_path: Path) -> None:
    ledgers.swept().write(tmp_path / "ledger.json")
    ended = quantkit("recommend", tmp_path)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == "For a laptop: Ship gguf-Q4_K_M on llamacpp."
    ended = quantkit("recommend", tmp_path, "--for", "server")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == "For a server: Ship gptq-w4g64 on vllm."
    assert any(
        line.startswith("runner-up  awq-w4g64 on vllm: 319 instead of 329") for line in lines
    )

    limits = ["--max-memory", "1GB", "--max-kld", "0.05", "--min-goodput", "1.5"]
    ended = quantkit("recommend", tmp_path, "--for", "server", *limits, "--json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["pick"]["variant"] == "gguf-Q4_K_M"
    assert list(found["profiles"]) == ["laptop", "server", "quality"]
    # 66.1 tokens/s x 3 x 32 / 34
    assert found["pick"]["output_tokens_per_s"]["value"] == pytest.approx(186.64, abs=0.01)
    assert [one["limit"] for one in found["binding"]] == ["max-memory", "max-kld"]
    assert found["binding"][0]["loosened_to"] == 2.15e9

    ended = quantkit("recommend", tmp_path, "--max-memory", "100MB")
    assert ended.returncode == 1
    assert ended.stdout.startswith("For a laptop: Nothing can be recommended")
    _fails(2, "--slo 'ttft=5': .*expected ttft_ms=500", "recommend", tmp_path, "--slo", "ttft=5")
    _fails(2, "--max-memory: expected a size", "recommend", tmp_path, "--max-memory", "much")
    _fails(2, "no such file", "recommend", tmp_path / "none")


def test_evaluate_a_variant_against_its_source(variant: Path, tiny_llama: Path) -> None:
    ended = quantkit(
        "evaluate", variant, tiny_llama, "--reference", tiny_llama, "--text", "pydoc:evaluation",
        "--windows", "2", "--context", "128", "--json",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    measured = {
        name: one["texts"]["pydoc:evaluation"]["metrics"] for name, one in found["models"].items()
    }
    # The source is measured once, however often it is named.
    assert list(measured) == ["reference", "gguf-Q8_0"]
    assert 0 < measured["gguf-Q8_0"]["kld_mean"]["value"] < 0.05
    assert measured["reference"]["kld_mean"]["value"] == pytest.approx(0, abs=1e-9)
    for one in measured.values():
        assert one["ppl"]["n"] == 2 * 63
        assert one["ppl"]["value"] == pytest.approx(measured["reference"]["ppl"]["value"], rel=0.02)
    (pair,) = found["comparisons"]
    assert (pair["measure"], pair["a"], pair["b"]) == ("ppl", "reference", "gguf-Q8_0")
    assert pair["n"] == 2
    assert pair["verdict"] in ("better", "worse", "equivalent", "undecided")
    (told,) = found["groups"]
    assert (told["measure"], told["text"]) == ("ppl", "pydoc:evaluation")
    assert {id_ for group in told["groups"] for id_ in group} == {"reference", "gguf-Q8_0"}


def test_evaluate_on_several_texts_prints_the_mean_and_the_worst(
    variant: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("Two and two are four, and four and four are eight. " * 200)
    command = (
        "evaluate", variant, "--reference", tiny_llama, "--text", "pydoc:evaluation",
        "--text", mine, "--windows", "2", "--context", "128",
    )  # fmt: skip
    found = json.loads(quantkit(*command, "--json").stdout)
    on = {name: one["metrics"] for name, one in found["models"]["gguf-Q8_0"]["texts"].items()}
    assert list(on) == ["pydoc:evaluation", "mine.txt"]
    assert {one["ppl"]["protocol"]["text_sha256"] for one in on.values()}.__len__() == 2
    klds = [one["kld_mean"]["value"] for one in on.values()]
    assert [pair["text"] for pair in found["comparisons"]] == list(on)
    ended = quantkit(*command)
    assert ended.returncode == 0, ended.stderr
    worst = list(on)[klds.index(max(klds))]
    line = rf"gguf-Q8_0 +{sum(klds) / 2:.4g} ± \S+ +{max(klds):.4g} ± \S+ +{re.escape(worst)}\n"
    assert re.search(line, ended.stdout), ended.stdout
    assert "metric on mine.txt" in ended.stdout
    assert "ppl on mine.txt ±1 %" in ended.stdout
    twice = (*command, "--text", tmp_path / "elsewhere" / "mine.txt")
    _fails(2, "mine.txt is there twice", *twice)


def test_evaluate_prints_verdicts_of_questions_asked_until_decided(
    variant: Path, tiny_llama: Path
) -> None:
    ended = quantkit(
        "evaluate", variant, "--reference", tiny_llama, "--eval", "mmlu_dev", "--until", "decided",
        "--tolerance", "5",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "mmlu_acc ±5 points" in ended.stdout
    assert "against reference" in ended.stdout
    assert re.search(r"gguf-Q8_0 .* [0-9]+ of 282 ", ended.stdout)
    needs = (2, "a verdict needs questions", "evaluate", variant, "--until", "decided")
    _fails(*needs, "--eval", "mmlu_dev")
    _fails(*needs, "--reference", tiny_llama, "--text", "pydoc:evaluation")


def test_plan_prints_sizes_and_what_is_measured_as_it_is(tiny_llama: Path, variant: Path) -> None:
    small = "{spec: gguf:Q4_K_M, name: small}"
    entries = f"convert=[gguf:Q8_0, {small}, {{path: {variant}, name: theirs}}]"
    asked = ("plan", "quickstart", "--set", f"source={tiny_llama}", "--set", entries)
    *planned, brought = json.loads(quantkit(*asked, "--json").stdout)
    assert [(plan["id"], plan["spec"]) for plan in planned] == [
        ("gguf-Q8_0", "gguf:Q8_0"),
        ("small", "gguf:Q4_K_M"),
    ]
    assert brought == {"id": "theirs", "path": str(variant)}
    shown = quantkit(*asked).stdout
    assert re.search(r"^small +gguf:Q4_K_M ", shown, re.MULTILINE)
    assert f"theirs: measured as it is, from {variant}" in shown


def test_bad_specs(tiny_llama: Path, tmp_path: Path) -> None:
    base = ("convert", tiny_llama, "--out", tmp_path / "o", "--to")
    _fails(2, r"unknown format 'ggfu'.*did you mean 'gguf'\?", *base, "ggfu:Q8_0")
    _fails(2, r"'Q4_KM'.*did you mean 'Q4_K_M'\?", *base, "gguf:Q4_KM")
    _fails(2, r"'w4g65'.*did you mean", *base, "gptq:w4g65")
    assert not (tmp_path / "o").exists()


def test_existing_output_is_kept(variant: Path, tiny_llama: Path) -> None:
    before = (variant / "quantkit.json").read_bytes()
    _fails(
        2, r"gguf-Q8_0: exists already; .*--force",
        "convert", tiny_llama, "--to", "gguf:Q8_0", "--out", variant.parent,
    )  # fmt: skip
    assert (variant / "quantkit.json").read_bytes() == before


def test_run_refuses_before_it_works(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    source = f"source={tiny_llama}"
    base = ("run", "quickstart", "--set", source, "--set", "bench=null")
    _fails(2, "exists and is not a quantkit run", *base, "--out", tmp_path / "mine")
    _fails(2, "unknown key 'evaluate.wndows'", *base, "--set", "evaluate.wndows=3")
    _fails(2, r"not a shipped recipe", "run", "quikstart")
    _fails(2, r"no such directory", "run", "quickstart", "--set", "source=./absent")


def test_an_engine_that_is_not_installed_names_the_command(
    tiny_llama: Path, tmp_path: Path
) -> None:
    _fails(
        2, r"vllm: not installed; run: quantkit engines install vllm",
        "bench", tiny_llama, QUANTKIT_HOME=str(tmp_path),
    )  # fmt: skip
    _fails(
        2, r"unknown engine 'vlm'.*did you mean 'vllm'\?", "bench", tiny_llama, "--engine", "vlm"
    )


def test_a_disk_too_small_for_the_plan(tiny_llama: Path, tmp_path: Path) -> None:
    import quantkit.producers.convert as module
    from quantkit.errors import ConversionError

    with pytest.raises(ConversionError, match=r"needs 1000000\.00 GB and the disk has .* --out"):
        module.require_space(tmp_path / "not" / "yet", 10**15, "recipe x")


def test_not_a_ledger(tmp_path: Path) -> None:
    _fails(2, r"ledger\.json: no such file; `quantkit run` writes it", "report", tmp_path)


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path) -> None:
    ended = quantkit("report", tmp_path, "--debug")
    assert "Traceback" in ended.stderr
    assert ended.returncode != 0
