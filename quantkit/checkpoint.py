"""The source: a transformers checkpoint, opened without trusting it.

Weights come from safetensors only, one tensor at a time; pickle is never loaded and code that a
checkpoint carries is never run.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import hub
from quantkit.errors import CheckpointError, first_line
from quantkit.files import sha256_files

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FORMAT = "safetensors"
"""What an engine calls the format of an unquantized checkpoint."""

_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


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
        return _torch_dtype(self.dtype)


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
        if path.is_dir():
            return cls._open(path.absolute(), id=path.absolute().name)
        if path.suffix == ".gguf" and path.exists():
            raise CheckpointError(
                f"{path}: a GGUF is a source for `quantkit convert` only; everything else needs "
                "the checkpoint that it was made from"
            )
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
        config = _read_json(path / "config.json", "a checkpoint needs its config.json")
        if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise CheckpointError(
                f"{path}: no tokenizer (tokenizer.json or tokenizer.model); copy it from where "
                "the model came from"
            )
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
        return _torch_dtype(self.scheme.upper())

    @property
    def weights(self) -> Path:
        """What an engine is given to load: the directory."""
        return self.path

    @property
    def architecture(self) -> str:
        """The first entry of ``architectures``: ``LlamaForCausalLM``."""
        names = self.config.get("architectures") or ["(none named)"]
        return str(names[0])

    @property
    def parameters(self) -> int:
        """Number of stored weights; tied embeddings count once."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.numel * _DTYPES[info.dtype] for info in self.tensors.values())

    @property
    def sidecars(self) -> list[Path]:
        """Tokenizer, chat template and generation config: what a variant copies byte for byte."""
        return [self.path / name for name in hub.SIDECARS if (self.path / name).is_file()]

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Digest of every file that makes the model what it is, by file name."""
        shards = {info.shard for info in self.tensors.values()}
        files = {self.path / "config.json", *self.sidecars, *shards}
        return {file.name: digest for file, digest in sha256_files(sorted(files)).items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype in which it is stored, on the CPU."""
        from safetensors import safe_open

        with safe_open(self.tensors[name].shard, framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        return tensor

    @cached_property
    def hf_config(self) -> PretrainedConfig:
        """The configuration as transformers reads it; a checkpoint's own code is refused."""
        from quantkit.hf_config import read_config

        return read_config(self.path)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; see ``load_tokenizer``."""
        return load_tokenizer(self.path)

    def check_shapes(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError for the first tensor that is missing or of another shape."""
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


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }[name]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``directory``: tokenizer.json as it is, with the settings of
    tokenizer_config.json (the special tokens' names, the chat template) around it.

    The class that the settings name is not asked: those of transformers 5 put rules of their own
    in place of the file's, and checkpoints name wrong ones. transformers builds the tokenizer only
    where there is no tokenizer.json. Raise CheckpointError where it cannot be read.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        return load_auto_tokenizer(directory)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class Settings(PreTrainedTokenizerFast):  # type: ignore[misc]
        """All but the tokenizer itself: reading a large one and copying it takes seconds."""

        @classmethod
        def convert_to_native_format(cls, **settings: Any) -> dict[str, Any]:
            return {**settings, "tokenizer_object": Tokenizer(models.BPE())}

    try:
        tokenizer: PreTrainedTokenizerBase = Settings.from_pretrained(
            directory, local_files_only=True
        )
        # Only now: transformers adds tokens to what it has, and changes their flags.
        tokenizer._tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise CheckpointError(f"{directory}: unreadable tokenizer: {first_line(error)}") from error
    tokenizer.split_special_tokens = False
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        named = getattr(tokenizer, role)
        if named and tokenizer._tokenizer.token_to_id(named) is None:
            setattr(tokenizer, role, None)  # it would be given the id of another
    return tokenizer


def load_auto_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``directory`` as transformers, and vLLM with it, loads it: of the class that
    the settings name. Raise CheckpointError where transformers cannot read it."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise CheckpointError(f"{directory}: unreadable tokenizer: {first_line(error)}") from error
    return tokenizer


def _read_json(path: Path, why: str) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; {why}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def tensors_in(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a directory's safetensors files, by name; raise CheckpointError where there
    are none, or damaged ones."""
    return {info.name: info for shard in _shards(path) for info in _index(shard)}


def _shards(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, through its index where it has one."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        named = _read_json(index, "").get("weight_map", {})
        shards = [path / name for name in sorted(set(named.values()))]
        for shard in shards:
            if shard.parent != path or not shard.is_file():
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
