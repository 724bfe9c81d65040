"""A checkpoint's directory without what is not the model, for engines that look for themselves.

vLLM loads what the index names, also where ``model.safetensors`` lies beside it, and prefers
``consolidated.safetensors`` to both; llama.cpp's converter reads all that is called ``model*``.
vLLM ties where config.json says so, whatever is stored.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from quantkit.checkpoint import Checkpoint
from quantkit.files import partial_directory, sha256_json
from quantkit.home import home

_LEFT_OUT = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.py")


def linked(checkpoint: Checkpoint) -> Path:
    """A directory of the same name in quantkit's home: links to the checkpoint's files, its shards
    alone of all weights, and the config.json that describes them."""
    shards = {info.shard for info in checkpoint.tensors.values()}
    weights = {*shards, *([checkpoint.index] if checkpoint.index else [])}
    files = {
        file
        for file in checkpoint.path.iterdir()
        if file in weights or not any(file.match(pattern) for pattern in _LEFT_OUT)
    }
    key = [checkpoint.config, sorted(map(str, files))]
    place = home() / "linked" / sha256_json(key)[:16]
    if not place.is_dir():
        with partial_directory(place) as partial:
            directory = partial / checkpoint.path.name
            directory.mkdir()
            for file in files - {checkpoint.path / "config.json"}:
                (directory / file.name).symlink_to(file.resolve())
            config = json.dumps(checkpoint.config, indent=2)
            (directory / "config.json").write_text(config + "\n", encoding="utf-8")
            with suppress(OSError):  # another process made it meanwhile
                partial.rename(place)
    return place / checkpoint.path.name
