"""What vLLM computes of every family: the column of docs/models.md.

``python -m tests.integration.vllm_sweep [MODEL_TYPE …]`` prints a line for each family, and keeps
what it finds beside what ``sweep`` found. The toolchain of vLLM must be installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit import toolchains
from quantkit.data.calibration import calibrate
from quantkit.data.texts import load_text
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.decoder.expert_names import is_routed
from quantkit.engines.transformers.weights import load
from quantkit.engines.vllm import architectures
from quantkit.engines.vllm.unsupported import _flags, lacks_expert_kernels
from quantkit.errors import QuantkitError
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from quantkit.system.files import write_json
from tests.integration.small_decoders import CLASSES, make
from tests.integration.sweep import IDS, SPECS

FAMILIES = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "phi3", "smollm3", "seed_oss"),
    *("gemma2", "gemma3_text", "gemma4_text", "olmo2", "olmo3", "granite", "glm4", "ernie4_5"),
    *("hunyuan_v1_dense", "exaone4", "cohere2", "starcoder2", "stablelm", "gpt_neox", "gpt2"),
    *("lfm2", "qwen3_5_text", "granitemoehybrid"),
    *("deepseek_v2", "deepseek_v3", "qwen3_next", "qwen3_5_moe_text", "gpt_oss", "llama4_text"),
    *("glm4_moe", "minimax_m2", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"),
)
"""By ``model_type``; those without experts first."""

_DELTA = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
_LATENTS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_LATENTS, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_LATENTS, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe": {"head_dim": 32},
    "lfm2": {
        "block_dim": 128,
        "conv_dim": 128,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"],
        "num_hidden_layers": 2,
    },
    "llama4_text": {
        "attention_chunk_size": 128,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "moe_layers": [0, 1, 2, 3],
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
    },
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    "qwen3_5_moe_text": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_next": _DELTA,
}
"""Of families: what vLLM's kernels take, and what it reads in a config.json that transformers does
not write and released checkpoints have."""

SCRIPT = Path(__file__).with_name("vllm_scores.py")
RESULTS = Path(os.environ.get("VLLM_SWEEP", Path(__file__).with_name("vllm_sweep.json")))
TEXTS = IDS[:4]
SERVED = ("source", *SPECS)
NEAR, LEAST = 4.0, 0.01
"""The largest mean of a difference, in those that bfloat16 makes by itself; or this, if more."""
_AT_ONCE = 6


@dataclass(frozen=True)
class Mixed:
    """Patterns of linears that are skipped, and that have larger groups."""

    skipped: str
    coarse: str


@dataclass
class Outcome:
    """Of one family. ``differs``: of the source and of each format, the largest difference of a
    token's log-probability between vLLM, in bfloat16, and transformers, in float32, with the same
    weights; ``mean``: the mean of it, and ``noise``, that of transformers in
    bfloat16. ``why``: of what vLLM or quantkit refuses, one line.
    ``experts``: whether its experts, if any, were quantized, for which a CPU needs AMX."""

    model_type: str
    name: str
    experts: bool = True
    differs: dict[str, float] = field(default_factory=dict)
    mean: dict[str, float] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def agrees(self, what: str) -> bool:
        """Whether vLLM computes from ``source``, ``gptq`` or ``awq`` what transformers does."""
        return self.mean.get(what, math.inf) < max(LEAST, NEAR * self.mean["noise"])


def reference(model: Any) -> torch.Tensor:
    """The log-probability of each token but the first, (texts, tokens - 1)."""
    with torch.no_grad():
        logits = model(input_ids=TEXTS, use_cache=False).logits[:, :-1].float()
    found: torch.Tensor = logits.log_softmax(-1).gather(-1, TEXTS[:, 1:, None])[..., 0]
    return found


def sweep(
    model_types: Iterable[str], work: Path, mixed: Mapping[str, Mixed] | None = None
) -> Iterator[Outcome]:
    """The outcome of each family; all of them are made before vLLM starts. ``mixed``: by family."""
    outcomes, expected = [], {}
    for model_type in model_types:
        outcome = Outcome(model_type, CLASSES[model_type])
        outcomes.append(outcome)
        place = work / model_type
        path = make(model_type, place / "source", **SETTINGS.get(model_type, {}))
        source = Checkpoint.open(path)
        expected[path] = reference(load(source, torch.float32))
        noise = reference(load(source, torch.bfloat16)) - expected[path]
        outcome.mean["noise"] = round(float(noise.abs().mean()), 4)
        text = load_text("pydoc:calibration")
        windows = calibrate(text, source.tokenizer, samples=16, sequence_length=64, seed=0)
        outcome.experts = not (_has_experts(source) and lacks_expert_kernels(_flags()))
        skip = [] if outcome.experts else [r"\.experts\."]
        for method, spec in SPECS.items():
            try:
                entry: dict[str, Any] = {"spec": spec, "name": method, "skip": skip}
                if mixed:
                    entry["skip"] = [*skip, mixed[model_type].skipped]
                if mixed and method == "gptq":
                    entry["overrides"] = {mixed[model_type].coarse: "w4g64"}
                asked = Spec.of_entry(entry)
                variant = convert(source, asked, windows, place)
                expected[variant.path] = reference(load(variant, torch.float32))
            except QuantkitError as error:
                outcome.why[method] = str(error).replace(f"{source.path}", "source")
    scores = vllm_scores({path: _options(path.parent.name) for path in expected}, work)
    for outcome in outcomes:
        for path, exact in expected.items():
            if path.parent.name != outcome.model_type:
                continue
            what, found = path.name, scores[f"{path}"]
            if "error" in found:
                outcome.why[what] = found["error"].replace(f"{work}/", "").partition("\n")[0]
                continue
            off = (torch.tensor(found["scores"]) - exact).abs()
            outcome.differs[what] = round(float(off.max()), 4)
            outcome.mean[what] = round(float(off.mean()), 4)
        yield outcome


def _has_experts(source: Checkpoint) -> bool:
    blocks = DecoderBlocks(source)
    return any(
        is_routed(name) for index in range(len(blocks)) for name in blocks.linears(index).values()
    )


def _options(model_type: str) -> dict[str, Any]:
    """As quantkit serves it."""
    if not architectures.rotated_by_heads(CLASSES[model_type]):
        return {}
    return {"compilation_config": architectures.NO_ROTARY_KERNEL}


def vllm_scores(models: dict[Path, dict[str, Any]], work: Path) -> dict[str, Any]:
    """What vLLM gives for each of ``models``, with these options: its scores, or its error."""
    jobs, results = work / "jobs.json", work / "results.jsonl"
    asked = {f"{path}": options for path, options in models.items()}
    jobs.write_text(json.dumps({"texts": TEXTS.tolist(), "models": asked}))
    results.touch()
    argv = [str(toolchains.find("vllm").python), "-I", str(SCRIPT), str(jobs), str(results)]
    with (work / "vllm.log").open("wb") as log:
        subprocess.run(argv, check=True, stdout=log, stderr=log)
    lines = map(json.loads, results.read_text().splitlines())
    return {line["model"]: line for line in lines}


def outcomes() -> dict[str, Outcome]:
    """What the last sweeps found, by ``model_type``."""
    written = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return {model_type: Outcome(**one) for model_type, one in written.items()}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", help="all where none is named")
    parser.add_argument("--keep", type=Path, help="a directory for models and vLLM's logs")
    asked = parser.parse_args()
    wanted = asked.model_types or list(FAMILIES)
    for start in range(0, len(wanted), _AT_ONCE):
        with tempfile.TemporaryDirectory(prefix="vllm-sweep-") as own:
            place = asked.keep / f"{start}" if asked.keep else Path(own)
            place.mkdir(parents=True, exist_ok=True)
            for found in sweep(wanted[start : start + _AT_ONCE], place):
                print(found.model_type, found.differs, found.mean, found.why, flush=True)
                kept = outcomes() | {found.model_type: found}
                write_json(RESULTS, {name: asdict(one) for name, one in sorted(kept.items())})


if __name__ == "__main__":
    _main()
