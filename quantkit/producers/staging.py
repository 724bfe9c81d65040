"""The checkpoint as a package gets it, and what is taken over of what the package wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkit.errors import ConversionError
from quantkit.models.checkpoint import Checkpoint

_ONLY = "model.safetensors"


def stage_source(checkpoint: Checkpoint, directory: Path, *, transformers_4: bool) -> None:
    """A directory of links to the weights and tokenizer, with a config.json of its own.

    The package sees no other file of the checkpoint: no code, no pickle.
    """
    if checkpoint.quantized:
        raise ConversionError(
            f"{checkpoint.path}: is quantized already ({checkpoint.quantized}), and packages read "
            "the files themselves; use a producer of quantkit's own (native)"
        )
    directory.mkdir()
    shards = {info.shard for info in checkpoint.tensors.values()}
    index = [checkpoint.index] if checkpoint.index else []
    for file in (*shards, *checkpoint.sidecars, *index):
        link = directory / file.relative_to(checkpoint.path)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(file.resolve())
    config = as_transformers_4(checkpoint.config) if transformers_4 else checkpoint.config
    _write(directory / "config.json", config)


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in the keys that transformers 4 reads.

    Transformers 5 writes ``rope_parameters`` and ``dtype``, of which 4 knows nothing: it would take
    the model's default rotary base, and calibrate on what another model computes.
    """
    found = dict(config)
    if "dtype" in found:
        found["torch_dtype"] = found.pop("dtype")
    rope = found.pop("rope_parameters", None)
    if rope is None:
        return found
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConversionError(
            "rope_parameters per kind of layer, which transformers 4 does not support; use "
            "producer native or auto-round"
        )
    rope = dict(rope)
    if "rope_theta" in rope:
        found["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    found["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return found


def take_over(made: Path, checkpoint: Checkpoint, directory: Path) -> dict[str, Any]:
    """Move the package's weights into ``directory``, and write the source's config.json there.

    To that the package's ``quantization_config`` is added, which is returned, and the dtype in
    which it stored what it did not quantize. Raise ConversionError where it wrote none.
    """
    shards = sorted(made.glob("*.safetensors"))
    if not shards:
        raise ConversionError(f"the producer wrote no safetensors into {made}")
    for file in (*shards, *made.glob("*.safetensors.index.json")):
        file.rename(directory / (_ONLY if len(shards) == 1 else file.name))
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    beside = made / "quantize_config.json"
    quantization: dict[str, Any] | None = config.get("quantization_config")
    if quantization is None and beside.is_file():
        quantization = json.loads(beside.read_text(encoding="utf-8"))
    if quantization is None:
        raise ConversionError(f"the producer wrote no quantization_config into {made}")
    # The temporary directory of this process does not belong in the config.
    quantization = {k: v for k, v in quantization.items() if k != "model_name_or_path"}
    dtype = config.get("dtype") or config.get("torch_dtype")
    key = "dtype" if "dtype" in checkpoint.config else "torch_dtype"
    own = {**checkpoint.config, **({key: dtype} if dtype else {})}
    _write(directory / "config.json", {**own, "quantization_config": quantization})
    if quantization.get("quant_method") == "gptq":
        _write(directory / "quantize_config.json", quantization)
    return quantization


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
