"""A checkpoint's directory without what is not the model, for engines that look for themselves.

vLLM loads what the index names, also where ``model.safetensors`` lies beside it, and prefers
``consolidated.safetensors`` to both; llama.cpp's converter reads all that is called ``model*``.
vLLM ties where config.json says so, whatever is stored.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantkit.system.files import partial_directory, sha256_json
from quantkit.system.home import home

LEFT_OUT = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.py")


def linked(path: Path, config: dict[str, Any], weights: Collection[Path]) -> Path:
    """A directory of the same name in quantkit's home: links to the files of a checkpoint, of all
    weights those given, and the ``config`` that describes them."""
    files = {
        file
        for file in path.iterdir()
        if file in weights or not any(file.match(pattern) for pattern in LEFT_OUT)
    }
    key = [config, sorted(map(str, files))]
    place = home() / "linked" / sha256_json(key)[:16]
    if not place.is_dir():
        with partial_directory(place) as partial:
            directory = partial / path.name
            directory.mkdir()
            for file in files - {path / "config.json"}:
                (directory / file.name).symlink_to(file.resolve())
            written = json.dumps(config, indent=2) + "\n"
            (directory / "config.json").write_text(written, encoding="utf-8")
            with suppress(OSError):  # another process made it meanwhile
                partial.rename(place)
    return place / path.name
