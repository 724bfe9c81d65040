"""Every architecture against llama.cpp's converter, byte for byte, and against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from quantkit.formats.gguf import architectures
from quantkit.formats.gguf.header import read_header
from quantkit.models.checkpoint import Checkpoint
from tests.integration.gguf_cases import BEYOND, CASES, make
from tests.integration.gguf_oracle import assert_same_gguf, convert, loaded, oracle
from tests.models import VOCABULARY

TOKENS = 48
"""More than the models' windows and the lengths that some were trained for."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    models = tmp_path_factory.mktemp("models")
    return {n: Checkpoint.open(make(case, models / n)) for n, case in (CASES | BEYOND).items()}


@pytest.fixture(scope="module")
def theirs(
    checkpoints: dict[str, Checkpoint],
    llama_cpp_source: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """What llama.cpp's converter makes of them, but for their tokenizer, which it does not know."""
    out = tmp_path_factory.mktemp("theirs")
    files = {name: out / f"{name}.gguf" for name in CASES}
    jobs = [(checkpoints[name].path, CASES[name].scheme, file) for name, file in files.items()]
    oracle(llama_cpp_source, jobs, tokenizer=False)
    return files


@pytest.mark.parametrize("name", CASES)
def test_files_equal_the_converters(
    checkpoints: dict[str, Checkpoint], theirs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    ours = convert(checkpoints[name], CASES[name].scheme, tmp_path / "ours")
    # For GPT-NeoX the converter forgets the file type.
    forgotten = ("general.file_type",) if CASES[name].family == "gpt_neox" else ()
    assert_same_gguf(ours, theirs[name], but=("tokenizer.", *forgotten))
    # This one it writes before all others, on the way to a tensor.
    early = "phi3.rope.scaling.attn_factor"
    in_order = [
        [key for key in read_header(file).metadata if not key.startswith(("tokenizer.", early))]
        for file in (ours, theirs[name])
    ]
    assert [key for key in in_order[0] if key not in forgotten] == in_order[1]


class Gelu(torch.nn.Module):
    """llama.cpp's: by tanh, from a table of halves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < 10, table, x.clamp(min=0))


@pytest.mark.parametrize("name", CASES | BEYOND)
def test_f32_in_llama_cpp_gives_the_logits_of_transformers(
    checkpoints: dict[str, Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    for activation in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
        monkeypatch.setitem(ACT2FN, activation, Gelu)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints[name].path, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids[None]).logits[0].log_softmax(-1)
    file = convert(checkpoints[name], "F32", tmp_path / "ours")
    options: dict[str, Any] = {"logits_all": True, "type_k": 0, "type_v": 0, "flash_attn": False}
    with loaded(file, n_ctx=64, **options) as llama:
        llama.eval(ids.tolist())
        found = torch.tensor(np.array(llama.scores[:TOKENS])).log_softmax(-1)
    assert expected.std() > 0.3  # not so flat that anything would do
    assert (found - expected).abs().max() < (CASES | BEYOND)[name].tolerance


def test_every_architecture_has_a_case(checkpoints: dict[str, Checkpoint]) -> None:
    assert {checkpoints[name].architecture for name in CASES} == set(architectures.SUPPORTED)
