"""The source: a transformers checkpoint, opened without trusting it.

Weights come from safetensors only, one tensor at a time; pickle is never loaded and code that a
checkpoint carries is never run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import dtypes, hub
from quantkit.chat_template import DEFAULT, chat_templates
from quantkit.errors import CheckpointError, first_line, reading
from quantkit.files import sha256_files
from quantkit.gguf_files import gguf_at
from quantkit.json_file import read_object

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FORMAT = "safetensors"
"""What an engine calls the format of an unquantized checkpoint."""

_ADAPTER = "adapter_config.json"
"""How a LoRA adapter is known: PEFT's settings."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is; ``dtype`` in safetensors' words (``BF16``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch's words."""
        return dtypes.torch_dtype(self.dtype)

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        return dtypes.stored_bytes(self.dtype, self.shape)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint: configuration, tokenizer files and an index of its tensors.

    ``id`` is what the user named: a hub id, ``demo:…`` or the directory's name. ``origin`` says
    in a sentence what the weights are, where that is worth a reader's attention.
    """

    id: str
    path: Path
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    origin: str | None = None

    format = FORMAT

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a local directory, a hub id ``org/name[@revision]`` or ``demo:NAME``.

        Raise CheckpointError for anything missing, truncated or unsafe.
        """
        text = str(source)
        if text.startswith("demo:"):
            from quantkit import demo

            return cls._open(demo.directory(text), id=text, origin=demo.ORIGIN)
        path = Path(text).expanduser()
        if gguf_at(path):
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
        _refuse_adapter(path)
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path / 'config.json'}: no such file; a checkpoint needs its config.json"
            )
        config = read_object(path / "config.json")
        _require_tokenizer(path)
        # A snapshot's directory in the hub's cache is named after its commit.
        return cls(id, path, path.name if of_hub else None, config, tensors_in(path), origin)

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
        """What an engine is given to load: the directory."""
        return self.path

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
        """Number of stored weights; tied embeddings count once."""
        return sum(info.numel for info in self.tensors.values())

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

        shard = self.tensors[name].shard
        with reading(f"{shard}: {name}"), safe_open(shard, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    @cached_property
    def hf_config(self) -> PretrainedConfig:
        """The configuration as transformers reads it; a checkpoint's own code is refused."""
        from quantkit.hf_config import check_repeated, read_config

        config = read_config(self.path)
        # A layer or an expert is a tensor at the least, or a part of one that is a stack.
        stacks = (info.shape[0] for info in self.tensors.values() if len(info.shape) > 2)
        check_repeated(config, self.path / "config.json", max(len(self.tensors), *stacks, 0))
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as transformers loads it from the local files."""
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


def _refuse_adapter(path: Path) -> None:
    """Raise CheckpointError for a directory with the weights of a LoRA, and none of a model."""
    weights = [file.name for file in path.glob("*.safetensors")]
    if not (path / _ADAPTER).is_file() or weights not in ([], ["adapter_model.safetensors"]):
        return
    base = read_object(path / _ADAPTER).get("base_model_name_or_path") or "its base model"
    raise CheckpointError(
        f"{path}: is a LoRA adapter of {base}, not a model; merge it first: "
        "peft.AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(OUT)"
        ", and copy the tokenizer to OUT"
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``directory``; raise CheckpointError where transformers cannot read it."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        _require_tokenizer(directory)
        raise CheckpointError(f"{directory}: unreadable tokenizer: {first_line(error)}") from error
    if tokenizer.chat_template is None:  # transformers leaves chat_template.json to processors
        tokenizer.chat_template = chat_templates(directory).get(DEFAULT)
    return tokenizer


def _require_tokenizer(directory: Path) -> None:
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(
            f"{directory}: no tokenizer (tokenizer.json or tokenizer.model); copy it from where "
            "the model came from"
        )


def tensors_in(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a directory's safetensors files, by name; raise CheckpointError where there
    are none, or damaged ones."""
    found = {info.name: info for shard in _shards(path) for info in _index(shard)}
    if not found:
        raise CheckpointError(f"{path}: its safetensors hold no tensors")
    return found


def _shards(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, through its index where it has one."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = [path / name for name in _named_in(index)]
        for shard in shards:
            if not shard.is_file():
                raise CheckpointError(f"{shard}: no such file; {index.name} names it: download it")
        return shards
    shards = sorted(path.glob("*.safetensors"))
    if shards:
        return shards
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{path}: no safetensors, only {', '.join(sorted(pickles)[:3])}, which may be pickle "
            "and is never loaded; get the safetensors, or save them with "
            "model.save_pretrained(..., safe_serialization=True) where you trust the file"
        )
    raise CheckpointError(f"{path}: no safetensors; expected model.safetensors or its shards")


def _named_in(index: Path) -> list[str]:
    """The shards that an index names; raise CheckpointError for what is no file's name."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: no weight_map, which says where each tensor is")
    for tensor, name in places.items():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise CheckpointError(
                f"{index}: {tensor} is in {name!r}, expected the name of a file beside the index"
            )
    return sorted(set(places.values()))


def _index(shard: Path) -> list[TensorInfo]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="numpy") as file:  # which is there sooner than torch
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [
                TensorInfo(name, part.get_dtype(), tuple(part.get_shape()), shard)
                for name, part in slices.items()
            ]
    except SafetensorError as error:
        raise CheckpointError(
            f"{shard}: damaged or truncated safetensors ({shard.stat().st_size} bytes): {error}; "
            "download it again"
        ) from error
