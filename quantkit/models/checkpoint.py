"""The source: a transformers checkpoint, opened without trusting it.

Weights come from safetensors only, one tensor at a time; pickle is never loaded and code that a
checkpoint carries is never run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, reading
from quantkit.models import dtypes, hub, tied_weights, weight_files
from quantkit.models.gguf_files import holds_gguf
from quantkit.models.linked import linked
from quantkit.models.merge_record import MergeRecord
from quantkit.models.tensors import TensorInfo, tensors_of
from quantkit.models.tokenizer import load_tokenizer, require_tokenizer
from quantkit.system.files import sha256_files
from quantkit.system.json_file import read_object

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FORMAT = "safetensors"
"""What an engine calls the format of an unquantized checkpoint."""

ADAPTER = "adapter_config.json"
"""How a LoRA adapter is known: PEFT's settings."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint: configuration, tokenizer files and an index of its tensors.

    ``id`` is what the user named: a hub id, ``demo:…`` or the directory's name. ``origin`` says
    in a sentence what the weights are, where that is worth a reader's attention. ``config`` is
    config.json's, corrected where it says of tied weights what is not so. ``twice``: names of
    tensors that are equal to others and tied to them. ``index``: the file that named the shards.
    ``notes``: where the directory holds something else than it seems to. ``quantized``: how the
    weights are stored, where ``read`` decodes them. ``merged``: what they were merged from.
    """

    id: str
    path: Path
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    origin: str | None = None
    twice: frozenset[str] = frozenset()
    index: Path | None = None
    notes: tuple[str, ...] = ()
    quantized: str | None = None
    merged: MergeRecord | None = None

    format = FORMAT

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a local directory, a hub id ``org/name[@revision]`` or ``demo:NAME``.

        Raise CheckpointError for anything missing, truncated or unsafe.
        """
        text = str(source)
        if text.startswith("demo:"):
            from quantkit.models import demo

            return cls._open(demo.directory(text), id=text, origin=demo.ORIGIN)
        path = Path(text).expanduser()
        if holds_gguf(path):
            raise CheckpointError(
                f"{path}: a GGUF is a source for `quantkit convert` only; everything else needs "
                "the checkpoint that it was made from"
            )
        if path.is_dir():
            return cls._open(path.absolute(), id=path.absolute().name)
        if path.exists():
            raise CheckpointError(f"{path}: is a file; a checkpoint is a directory or a hub id")
        if not hub.names_hub(text):
            raise CheckpointError(
                f"{text}: no such directory; give one, a hub id (org/name) or demo:smollm2-135m"
            )
        return cls._open(hub.download(text), id=text.partition("@")[0], of_hub=True)

    @classmethod
    def _open(
        cls, path: Path, *, id: str, origin: str | None = None, of_hub: bool = False
    ) -> Checkpoint:
        refuse_adapter(path)
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path / 'config.json'}: no such file; a checkpoint needs its config.json"
            )
        config = read_object(path / "config.json")
        require_tokenizer(path)
        files = weight_files.find(path, config)
        config.pop(weight_files.NAMED, None)  # as transformers, which does not save it again
        tied = tied_weights.resolve(path, config, tensors_of(files.files))
        if tied.apart:
            config[tied_weights.KEY] = False
        merged = MergeRecord.of(path)
        return cls(
            id,
            path,
            path.name if of_hub else None,  # a snapshot's directory is named after its commit
            config,
            tied.tensors,
            merged.origin if merged else origin,
            tied.twice,
            files.index,
            (*(merged.notes if merged else ()), *filter(None, (files.note, tied.note))),
            merged=merged,
        )

    @property
    def scheme(self) -> str:
        """The dtype of most weights, in lower case: ``bf16``."""
        totals: dict[str, int] = {}
        for info in self.tensors.values():
            totals[info.dtype] = totals.get(info.dtype, 0) + info.numel
        return max(totals, key=lambda dtype: totals[dtype]).lower()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights."""
        return dtypes.torch_dtype(self.scheme.upper())

    @property
    def weights(self) -> Path:
        """What an engine is given to load: the directory, or where it would load something else
        from that, a directory of links to what the model is (``linked``)."""
        if self.notes == tuple(self.merged.notes if self.merged else ()):
            return self.path
        shards = {info.shard for info in self.tensors.values()}
        weights = {*shards, *([self.index] if self.index else [])}
        return linked(self.path, self.config, weights)

    @property
    def architecture(self) -> str:
        """The first entry of ``architectures``: ``LlamaForCausalLM``."""
        names = self.config.get("architectures") or ["(none named)"]
        if not isinstance(names, list) or not isinstance(names[0], str):
            raise CheckpointError(
                f"{self.path / 'config.json'}: architectures is {names!r}, expected a list of names"
            )
        return names[0]

    @property
    def parameters(self) -> int:
        """Number of weights; tied embeddings count once, also where they are stored twice."""
        return sum(info.numel for name, info in self.tensors.items() if name not in self.twice)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.bytes for info in self.tensors.values())

    @property
    def sidecars(self) -> list[Path]:
        """Tokenizer, chat template and generation config: what a variant copies byte for byte."""
        found = (file for pattern in hub.SIDECARS for file in sorted(self.path.glob(pattern)))
        return [file for file in found if file.is_file()]

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Digest of every file that makes the model what it is, by its path in the directory."""
        shards = {info.shard for info in self.tensors.values()}
        files = {self.path / "config.json", *self.sidecars, *shards}
        digests = sha256_files(sorted(files))
        return {str(file.relative_to(self.path)): digest for file, digest in digests.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype in which it is stored, on the CPU."""
        from safetensors import safe_open

        info = self.tensors[name]
        with reading(f"{info.shard}: {name}"), safe_open(info.shard, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(info.stored or name)
        return tensor

    @cached_property
    def hf_config(self) -> PretrainedConfig:
        """The configuration as transformers reads it; a checkpoint's own code is refused."""
        from quantkit.models.hf_config import check_repeated, read_config

        config = read_config(self.path)
        # A layer or an expert is a tensor at the least, or a part of one that is a stack.
        stacks = (info.shape[0] for info in self.tensors.values() if len(info.shape) > 2)
        check_repeated(config, self.path / "config.json", max(len(self.tensors), *stacks, 0))
        if self.config.get(tied_weights.KEY) is False:
            config.tie_word_embeddings = False
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; see ``load_tokenizer``."""
        return load_tokenizer(self.path)

    def check_shapes(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError for the first tensor that is missing, of another shape, or holds
        something else than the values of weights."""
        for name, shape in expected.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{self.path}: tensor {name} {list(shape)} is missing; "
                    "config.json does not describe these weights"
                )
            if self.tensors[name].shape != shape:
                raise CheckpointError(
                    f"{self.tensors[name].shard}: {name} has shape "
                    f"{list(self.tensors[name].shape)}, config.json asks for {list(shape)}"
                )
            if self.tensors[name].dtype not in dtypes.WEIGHTS:
                raise CheckpointError(
                    f"{self.tensors[name].shard}: {name} is stored as {self.tensors[name].dtype}, "
                    f"weights are {', '.join(dtypes.WEIGHTS)}; get the checkpoint as it was before "
                    "it was quantized"
                )

    def check_finite(self) -> None:
        """Raise CheckpointError for the first tensor with NaN or infinity; reads them all."""
        for name, info in self.tensors.items():
            if info.numel and not all(end.isfinite() for end in self.read(name).aminmax()):
                raise CheckpointError(
                    f"{info.shard}: {name} holds NaN or infinity: the weights are bad; get them "
                    "again"
                )


def refuse_adapter(path: Path) -> None:
    """Raise CheckpointError for a directory with the weights of a LoRA, and none of a model."""
    weights = [file.name for file in path.glob("*.safetensors")]
    if not (path / ADAPTER).is_file() or weights not in ([], ["adapter_model.safetensors"]):
        return
    base = read_object(path / ADAPTER).get("base_model_name_or_path") or "BASE"
    raise CheckpointError(
        f"{path}: is a LoRA adapter of {base}, not a model; give its base too: quantkit convert "
        f"{base} --adapter {path}, in a recipe `source: {{base: {base}, adapter: {path}}}`"
    )
