"""Write safetensors as they come, in shards of bounded size."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

_SHARD_BYTES = 4 << 30


class ShardWriter:
    """Collects tensors into ``directory``; a full shard is written and forgotten.

    One shard becomes ``model.safetensors``; several get the usual names and an index.
    ``tensor_bytes`` counts the bytes of all tensors added.
    """

    def __init__(self, directory: Path, shard_bytes: int = _SHARD_BYTES) -> None:
        self.tensor_bytes = 0
        self._directory = directory
        self._limit = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it goes to the CPU and keeps its dtype."""
        tensor = tensor.detach().cpu().contiguous()
        if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self.tensor_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, give the shards their final names, and write the index."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self._directory / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._written):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._part(index).rename(self._directory / file)
            weight_map.update(dict.fromkeys(names, file))
        content = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": weight_map}
        (self._directory / "model.safetensors.index.json").write_text(
            json.dumps(content, indent=2, sort_keys=True) + "\n"
        )

    def _flush(self) -> None:
        path = self._part(len(self._written))
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner can read
        self._written.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self._directory / f"part-{index:05d}.safetensors"
