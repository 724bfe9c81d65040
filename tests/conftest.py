from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from quantkit.system.progress import to_terminal
from quantkit.system.threads import spin_briefly

os.environ.setdefault("HF_HUB_OFFLINE", "1")
spin_briefly()
to_terminal()  # as the command line does: tests read what is said
# Shells start background jobs with SIGINT ignored, which the processes of the tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama of bf16; read-only."""
    from tests.models import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen2 (biases, untied embeddings) of bf16, in two shards; read-only."""
    from tests.models import make_checkpoint

    return make_checkpoint(
        tmp_path_factory.mktemp("models") / "tiny-qwen2",
        family="qwen2",
        shards=2,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """WikiText-2, MMLU and calibration text, where a checkout has them beside it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(
            f"no data at {SHARED_DATA}: WikiText-2, MMLU and calibration text lie beside a checkout"
        )
    return SHARED_DATA
