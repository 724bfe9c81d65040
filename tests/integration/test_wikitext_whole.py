"""The whole WikiText-2 test, ours beside llama-perplexity's: ``pytest -m slow``, half an hour."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.models.checkpoint import Checkpoint
from tests import llama_perplexity
from tests.benchmarks import agreement


@pytest.mark.slow
@pytest.mark.parametrize("context", [512, 2048])
def test_the_whole_text_gives_llama_perplexitys_numbers(
    demo: Checkpoint, tmp_path: Path, context: int
) -> None:
    """Perplexity to 0.05 %, KLD with its percentiles to 1 %, where the tool leaves the tail out."""
    if not agreement.TEXT.is_file():
        pytest.skip(f"no WikiText-2 at {agreement.TEXT}: it is not in the project")
    if not llama_perplexity.PROGRAM.is_file():
        pytest.skip(f"{llama_perplexity.PROGRAM}: llama-cpp-python was built without its tools")
    variants = agreement.made(demo, ("BF16", "Q4_K_M"), tmp_path)
    base = variants.pop("BF16")
    cut = agreement.text_windows(demo, context)
    steps = agreement.Steps(tmp_path / "steps.json")
    rows = list(agreement.compare(base, variants, cut, tmp_path, steps))
    assert len(rows) == 2 + len(agreement.ROWS)
    for row in rows:
        limit = 5e-4 if row.metric.startswith("ppl") else 1e-2
        assert abs(row.difference) <= limit, row
