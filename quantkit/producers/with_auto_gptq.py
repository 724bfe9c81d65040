"""AutoGPTQ's part of a job: run by ``launcher.py`` in AutoGPTQ's environment.

Interface as of auto-gptq 0.7.1, the last release: https://github.com/AutoGPTQ/AutoGPTQ
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def make(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize and save; see ``launcher.py``. The package computes on CUDA only."""
    import torch
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    given = dict(job["options"])
    batch = given.pop("batch_size")
    ids = torch.tensor(json.loads(Path(job["token_ids"]).read_text(encoding="utf-8")))
    config = BaseQuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=True, **given)
    model = AutoGPTQForCausalLM.from_pretrained(
        job["source"], config, trust_remote_code=False, use_safetensors=True
    )
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    model.quantize(examples, batch_size=batch)
    model.save_quantized(job["output"], use_safetensors=True)
    return {
        "directory": job["output"],
        "calibration": f"{len(ids)} x {ids.shape[1]} token ids, in batches of {batch}",
        "options": {**job["options"], "sym": True},
    }
