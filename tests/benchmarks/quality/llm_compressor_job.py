"""llm-compressor's part: run by the Python of its own environment, with a job file.

Interface as of llm-compressor 0.14: https://github.com/vllm-project/llm-compressor
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def make(job: dict[str, Any]) -> None:
    """Quantize as its examples do, on the token ids that were given, and save."""
    import torch
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    if not torch.accelerator.is_available():
        # Its AWQ pins activations that wait for an accelerator, and torch cannot without one.
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
    scheme = preset_name_to_scheme(job["scheme"], ["Linear"])
    if job["scheme"].startswith("W4A16"):
        scheme.weights.group_size = job["group_size"]
    given = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    recipe = {
        "gptq": lambda: [GPTQModifier(**given)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**given)],
        "rtn": lambda: [QuantizationModifier(**given)],
        "smoothquant": lambda: [
            SmoothQuantModifier(smoothing_strength=0.8),
            GPTQModifier(**given),
        ],
    }[job["modifier"]]()
    samples = [
        {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), dtype=torch.long)}
        for ids in job["ids"]
    ]
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(
        job["source"], dtype="auto", local_files_only=True, trust_remote_code=False
    )
    oneshot(
        model=model,
        dataset=DataLoader(samples, batch_size=1),
        recipe=recipe,
        num_calibration_samples=len(samples),
        max_seq_length=len(job["ids"][0]),
    )
    model.save_pretrained(job["output"], save_compressed=True)
    result = {"seconds": time.monotonic() - started}
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    make(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
