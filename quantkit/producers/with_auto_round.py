"""AutoRound's part of a job: run by ``launcher.py`` in AutoRound's environment.

Interface as of AutoRound 0.16: https://github.com/intel/auto-round
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMATS = {"gptq": "auto_gptq", "awq": "auto_awq"}


def make(job: dict[str, Any]) -> dict[str, Any]:
    """Round, tuned where ``iters`` is not 0, and save; see ``launcher.py``."""
    import torch
    from auto_round import AutoRound

    given = job["options"]
    ids = torch.tensor(json.loads(Path(job["token_ids"]).read_text(encoding="utf-8")))
    batch = min(given["batch_size"], len(ids))
    # No mask, as with the data sets that the package loads itself: nothing is padded.
    parts = [ids[start : start + batch] for start in range(0, len(ids), batch)]
    asymmetric = job["format"] == "awq"
    rounder = AutoRound(
        job["source"],
        scheme=f"W{job['bits']}A16",
        group_size=job["group_size"],
        sym=not asymmetric,
        iters=given["iters"],
        lr=given["lr"],
        dataset=[{"input_ids": part, "attention_mask": None} for part in parts],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=batch,
        seed=job["seed"],
        device_map=job["device"],
    )
    rounder.quantize_and_save(job["output"], format=FORMATS[job["format"]])
    saved = next(Path(job["output"]).rglob("config.json"))
    return {
        "directory": str(saved.parent),
        "calibration": f"{len(ids)} x {ids.shape[1]} token ids, in batches of {batch}",
        "options": {**given, "sym": not asymmetric},
    }
