"""AutoAWQ's part of a job: run by ``launcher.py`` in AutoAWQ's environment.

Interface as of AutoAWQ 0.2.9, the last release: https://github.com/casper-hansen/AutoAWQ
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def make(job: dict[str, Any]) -> dict[str, Any]:
    """Search scales and clips, and save; see ``launcher.py``."""
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

    class Quantizer(AwqQuantizer):  # type: ignore[misc]
        """The search for scales multiplies weights in place, and restores them from a copy.

        But that copy is made by ``Tensor.cpu``, which copies nothing where they are on the CPU:
        there the weights stay scaled for good, and the model that is written is broken.
        """

        def _compute_best_scale(
            self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *rest: Any
        ) -> Any:
            state = module2inspect.state_dict
            module2inspect.state_dict = lambda: {k: v.clone() for k, v in state().items()}
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest)
            finally:
                del module2inspect.state_dict

    ids: list[list[int]] = json.loads(Path(job["token_ids"]).read_text(encoding="utf-8"))
    length = len(ids[0])
    model = AutoAWQForCausalLM.from_pretrained(
        job["source"], trust_remote_code=False, safetensors=True, device_map=job["device"]
    )
    # Samples no longer than max_calib_seq_len, together a multiple of it, are taken as they are.
    model.quantize(
        None,
        {
            "zero_point": True,
            "q_group_size": job["group_size"],
            "w_bit": job["bits"],
            "version": "GEMM",
        },
        calib_data=ids,
        max_calib_samples=len(ids),
        max_calib_seq_len=length,
        quantizer_cls=Quantizer,
        **job["options"],
    )
    model.save_quantized(job["output"])
    return {
        "directory": job["output"],
        "calibration": f"{len(ids)} x {length} token ids, all at once",
        "options": job["options"],
    }
