"""A producer's script as ``launcher.py`` runs it: rounds to nearest, and says what it was given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def make(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file, save_file

    if job["options"]["fail"] == "pickle":
        torch.load(job["source"])
    if job["options"]["fail"] == "error":
        raise ValueError("the Hessian is not positive definite")
    source, output = Path(job["source"]), Path(job["output"])
    size, packed = job["group_size"], {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "_proj.weight" not in name:
            packed[name] = tensor
            continue
        out, inputs = tensor.shape
        groups = tensor.float().view(out, -1, size)
        scales = (groups.abs().amax(-1) / 7).half()
        codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).view(
            out, inputs
        ).int() + 8
        qweight = torch.zeros(inputs // 8, out, dtype=torch.int32)
        for row in range(inputs):
            qweight[row // 8] |= codes[:, row] << 4 * (row % 8)
        stem = name.removesuffix(".weight")
        packed[f"{stem}.qweight"] = qweight
        zeros = torch.full((inputs // size, out // 8), 0x77777777, dtype=torch.int32)
        packed[f"{stem}.qzeros"] = zeros
        packed[f"{stem}.scales"] = scales.T.contiguous()
        packed[f"{stem}.g_idx"] = torch.arange(inputs, dtype=torch.int32) // size
    if job["options"]["fail"] == "nan":
        packed["model.layers.0.self_attn.q_proj.scales"][0, 0] = torch.nan
    (output / "deeper").mkdir(parents=True)
    save_file(packed, output / "deeper" / "gptq_model-4bit.safetensors")
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": size, "sym": True}
    config = json.loads((source / "config.json").read_text()) | {
        "use_cache": False,
        "quantization_config": quantization | {"model_name_or_path": job["source"]},
    }
    (output / "deeper" / "config.json").write_text(json.dumps(config))
    (output / "deeper" / "tokenizer.json").write_text("saved by another version")
    ids = json.loads(Path(job["token_ids"]).read_text())
    return {
        "directory": str(output / "deeper"),
        "calibration": f"{len(ids)} lists",
        "options": {
            "saw": sorted(file.name for file in source.iterdir()),
            "ids": ids,
            "job": {key: job[key] for key in ("format", "bits", "group_size", "seed", "device")},
        },
    }
