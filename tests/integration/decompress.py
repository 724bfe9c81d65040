"""Unpacks the quantized linears of a checkpoint with the package compressed-tensors.

A script for the interpreter of an environment that has the package. Arguments: the checkpoint, and
the safetensors file to write, with (out, in) weights under plain names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file


def main() -> None:
    checkpoint, out = Path(sys.argv[1]), sys.argv[2]
    settings = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig(**settings).config_groups.values()
    stored = load_file(checkpoint / "model.safetensors")
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    found = {}
    for linear in (name.removesuffix("_scale") for name in stored if name.endswith("weight_scale")):
        stem = linear.removesuffix("weight")
        parts = {n.removeprefix(stem): t for n, t in stored.items() if n.startswith(stem)}
        found[linear] = compressor.decompress(parts, scheme)["weight"].contiguous()
    save_file(found, out)


if __name__ == "__main__":
    main()
