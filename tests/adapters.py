"""LoRA adapters of tiny models, made and merged by PEFT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def make_adapter(
    base: Path, directory: Path, *, dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    """An adapter of a base, as if trained: nothing of it is zero, or one."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    asked = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **settings}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **asked))
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            spread = 0.2 * weight.data.std() if "magnitude" in name else 0.05
            weight.data += spread * torch.randn_like(weight)
            weight.data = weight.data.to(dtype)
    adapted.save_pretrained(directory)
    return directory


def merged_by_peft(base: Path, adapter: Path, directory: Path) -> Path:
    """The checkpoint that PEFT makes of both, with the base's tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(directory)
    for file in base.glob("tokenizer*.json"):
        shutil.copyfile(file, directory / file.name)
    return directory
