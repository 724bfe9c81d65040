"""What of quantkit works on every causal class of transformers: the table of docs/models.md.

``python -m tests.integration.sweep [MODEL_TYPE …]`` prints a line for each class;
``--streams`` leaves GPTQ and AWQ out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.texts import load_text
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.decoder.proof import streamed
from quantkit.engines.transformers.weights import load
from quantkit.errors import QuantkitError, first_line
from quantkit.formats.gguf.architectures import SUPPORTED
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.hf_config import attention
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from quantkit.producers.integer_linears import linear_names
from quantkit.quantize.rounding import plain_asymmetric, plain_symmetric
from quantkit.system.files import write_json
from tests.integration.small_decoders import CLASSES, NOT_BUILT, make
from tests.plain_weights import plain_weights

NEAR = 1e-3
"""The largest difference of a logit, in float32."""
RESULTS = Path(os.environ.get("SWEEP", Path(__file__).with_name("sweep.json")))
_LONGEST = 240
SPECS = {"gptq": "gptq:w4g32", "awq": "awq:w4g32"}
_ROUNDING = {"gptq": plain_symmetric, "awq": plain_asymmetric}
IDS = torch.randint(3, 900, (8, 64), generator=torch.Generator().manual_seed(5))


@dataclass
class Outcome:
    """Of one class. ``streams``: the largest difference of a logit. ``gain``: by format, the KL
    divergence from the source, of that of rounding to nearest. ``why``: by what failed, one line.
    """

    model_type: str
    name: str
    streams: float | None = None
    gain: dict[str, float] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    @property
    def gguf(self) -> str:
        """Who converts it."""
        return "native" if self.name in SUPPORTED else "fallback"

    def works(self, what: str) -> bool:
        """Whether it streams, or is better by ``gptq`` or ``awq`` than rounded to nearest."""
        if what == "streams":
            return self.streams is not None and self.streams < NEAR
        return 0 < self.gain.get(what, 1) < 1


def difference(source: Checkpoint) -> float:
    """The largest of a logit, between the streamed blocks and the model of transformers."""
    ids = IDS[:3]
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=torch.float32, attn_implementation=attention(source.hf_config)
    )
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, use_cache=False).logits
    blocks = DecoderBlocks(source)
    with blocks.running_apart():
        return float((streamed(blocks, ids, len(blocks)) - expected).abs().max())


def log_probabilities(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits.float().log_softmax(-1)
    return found


def rounded(source: Checkpoint, method: str) -> Any:
    """The model with every linear that is quantized rounded to nearest."""
    model: Any = load(source, torch.float32)
    blocks = DecoderBlocks(source)
    quantized = set(linear_names(blocks))
    for index in range(len(blocks)):
        for name, stored in blocks.linears(index).items():
            if stored in quantized:
                weight = model.get_parameter(f"{blocks.place}{index}.{name}.weight")
                weight.data = _ROUNDING[method](weight.data, 4, 32, torch.float32).dequantize()
    return model


def gain(source: Checkpoint, method: str, windows: Calibration, directory: Path) -> float:
    """The divergence of a variant from its source, of that of rounding to nearest.

    The variant is opened again, and holds for every linear what its integers say.
    """
    variant = convert(source, Spec.parse(SPECS[method]), windows, directory)
    made: Any = load(variant, torch.float32)
    blocks = DecoderBlocks(source)
    unpacked = dict(plain_weights(variant.path))
    for index in range(len(blocks)):
        for name, stored in blocks.linears(index).items():
            weight = made.get_parameter(f"{blocks.place}{index}.{name}.weight")
            assert torch.equal(unpacked[f"{stored}.weight"].float(), weight), name
    exact = log_probabilities(load(source, torch.float32))
    klds = [
        float((exact.exp() * (exact - log_probabilities(other))).sum(-1).mean())
        for other in (made, rounded(source, method))
    ]
    return klds[0] / klds[1]


def sweep(model_type: str, methods: tuple[str, ...] = tuple(SPECS)) -> Outcome:
    """The outcome of one class; what quantkit refuses is its outcome, all else raises."""
    outcome = Outcome(model_type, CLASSES[model_type])
    with tempfile.TemporaryDirectory(prefix="sweep-") as work:
        path = make(model_type, Path(work) / "source")
        try:
            source = Checkpoint.open(path)
            outcome.streams = difference(source)
        except QuantkitError as error:
            outcome.why["streams"] = str(error).replace(f"{path}", "source")
            return outcome
        if outcome.streams >= NEAR:
            outcome.why["streams"] = f"logits differ by {outcome.streams:.2g}"
        text = load_text("pydoc:calibration")
        windows = calibrate(text, source.tokenizer, samples=16, sequence_length=64, seed=0)
        for method in methods:
            try:
                outcome.gain[method] = gain(source, method, windows, Path(work))
            except QuantkitError as error:
                outcome.why[method] = str(error).replace(f"{path}", "source")
    return outcome


def _timed_out(*_: Any) -> None:
    raise TimeoutError(f"not done after {_LONGEST} seconds")


def _one(model_type: str, methods: tuple[str, ...]) -> Outcome:
    """As ``sweep``; what raises is an outcome too, and a fault."""
    signal.alarm(_LONGEST)
    try:
        return sweep(model_type, methods)
    except Exception as error:
        fault = f"FAULT: {type(error).__name__}: {first_line(error)}"
        return Outcome(model_type, CLASSES[model_type], why={"streams": fault})
    finally:
        signal.alarm(0)


def outcomes() -> dict[str, Outcome]:
    """What the last sweeps found, by ``model_type``."""
    written = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return {model_type: Outcome(**one) for model_type, one in written.items()}


def _main() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, _timed_out)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", help="all where none is named")
    parser.add_argument("--streams", action="store_true", help="without GPTQ and AWQ; kept nowhere")
    asked = parser.parse_args()
    for model_type in asked.model_types or [one for one in CLASSES if one not in NOT_BUILT]:
        found = _one(model_type, () if asked.streams else tuple(SPECS))
        works = {what: found.works(what) for what in ("streams", *SPECS)}
        print(model_type, works, found.gain, found.why, flush=True)
        if not asked.streams:
            kept = outcomes() | {model_type: found}
            write_json(RESULTS, {name: asdict(one) for name, one in sorted(kept.items())})


if __name__ == "__main__":
    _main()
