"""llm-compressor's part of a job: run by ``launcher.py`` in llm-compressor's environment.

Interface as of llm-compressor 0.14: https://github.com/vllm-project/llm-compressor
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def make(job: dict[str, Any]) -> dict[str, Any]:
    """Put a recipe together, run it, and save; see ``launcher.py``."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.accelerator.is_available():
        # Its AWQ pins activations that wait for an accelerator, and torch cannot without one.
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
    torch.manual_seed(job["seed"])
    ids: list[list[int]] = json.loads(Path(job["token_ids"]).read_text(encoding="utf-8"))
    calibration: dict[str, Any] = {}
    if ids:
        columns = {"input_ids": ids, "attention_mask": [[1] * len(sample) for sample in ids]}
        calibration = {
            "dataset": Dataset.from_dict(columns),
            "num_calibration_samples": len(ids),
            "max_seq_length": len(ids[0]),
            "shuffle_calibration_samples": False,
        }
    local = {"local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(
        job["source"], dtype="auto", use_safetensors=True, **local
    )
    tokenizer = AutoTokenizer.from_pretrained(job["source"], **local)
    oneshot(model=model, tokenizer=tokenizer, recipe=_recipe(job), **calibration)
    model.save_pretrained(job["output"], save_compressed=True)
    return {
        "directory": job["output"],
        "calibration": f"{len(ids)} x {len(ids[0])} token ids, one by one" if ids else "nothing",
        "options": job["options"],
    }


def _recipe(job: dict[str, Any]) -> list[Any]:
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    options = job["options"]
    scheme = preset_name_to_scheme(job["scheme"], ["Linear"])
    size = options["group_size"]
    if size is not None:
        groups = {"strategy": "channel"} if size == -1 else {"group_size": size}
        scheme.weights = QuantizationArgs(
            num_bits=job["bits"], symmetric=scheme.weights.symmetric, **groups
        )
    given = {"config_groups": {"group_0": scheme}, "ignore": job["ignore"]}
    first: list[Any] = []
    if options["smoothing"]:
        first = [SmoothQuantModifier(smoothing_strength=options["smoothing_strength"])]
    if options["algorithm"] == "gptq":
        return [*first, GPTQModifier(dampening_frac=options["dampening_frac"], **given)]
    if options["algorithm"] == "awq":
        first = [*first, AWQModifier(duo_scaling=options["duo_scaling"])]
    return [*first, QuantizationModifier(**given)]
