"""Opens one of our checkpoints with a package, and writes down the weights that it computes with.

A script for the interpreter of the package's environment. Arguments: ``autoawq`` or ``auto-gptq``,
the checkpoint, and the safetensors file to write. A linear's weight is what the package's own
module answers to the unit vectors.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import save_file


def opened(package: str, checkpoint: str) -> Any:
    if package == "autoawq":
        from awq import AutoAWQForCausalLM
        from awq.models import base

        # On what it takes for a CPU it demands Intel's extension, which is no longer made; what it
        # computes with on everything else runs here too.
        base.get_best_device = lambda: "another"
        return AutoAWQForCausalLM.from_quantized(
            checkpoint, fuse_layers=False, device_map={"": "cpu"}, trust_remote_code=False
        ).model
    from auto_gptq import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(
        checkpoint, device="cpu", use_safetensors=True, disable_exllama=True,
        disable_exllamav2=True, use_triton=False, trust_remote_code=False,
        inject_fused_attention=False, inject_fused_mlp=False,
    ).model  # fmt: skip


def main() -> None:
    package, checkpoint, out = sys.argv[1:]
    weights = {}
    for name, module in opened(package, checkpoint).named_modules():
        if hasattr(module, "qweight"):
            inputs = getattr(module, "in_features", None) or module.infeatures
            units = torch.eye(inputs, dtype=module.scales.dtype)
            answer = module(units).view(inputs, -1)
            weights[f"{name}.weight"] = answer.T.float().contiguous()
    save_file(weights, out)


if __name__ == "__main__":
    with torch.no_grad():
        main()
