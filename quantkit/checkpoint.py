"""The source: a transformers checkpoint, opened without trusting it.

Weights come from safetensors only, one tensor at a time; pickle is never loaded and code that a
checkpoint carries is never run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import dtypes, hub, tied_weights, weight_files
from quantkit.chat_template import DEFAULT, chat_templates
from quantkit.errors import CheckpointError, first_line, reading
from quantkit.files import sha256_files
from quantkit.gguf_files import gguf_at
from quantkit.json_file import load_json, read_object

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FORMAT = "safetensors"
"""What an engine calls the format of an unquantized checkpoint."""

_ADAPTER = "adapter_config.json"
"""How a LoRA adapter is known: PEFT's settings."""

_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.(original_)?inv_freq|rotary_emb\.(cos|sin)_cached|position_ids"
    r"|(attn|attention)\.masked_bias|causal_mask)$"
)
"""What old checkpoints store though it follows from the config: no parameters, and of no use."""
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
"""Likewise, where it is not a vector, as a linear's bias is."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is; ``dtype`` in safetensors' words (``BF16``).

    ``stored``: its name in the shard, where that is another one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    stored: str | None = None

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
    in a sentence what the weights are, where that is worth a reader's attention. ``config`` is
    config.json's, corrected where it says of tied weights what is not so. ``twice``: names of
    tensors that are equal to others and tied to them. ``index``: the file that named the shards.
    ``notes``: where the directory holds something else than it seems to.
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
        refuse_adapter(path)
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path / 'config.json'}: no such file; a checkpoint needs its config.json"
            )
        config = read_object(path / "config.json")
        _require_tokenizer(path)
        files = weight_files.find(path, config)
        config.pop(weight_files.NAMED, None)  # as transformers, which does not save it again
        tied = tied_weights.resolve(path, config, _tensors(files.files))
        if tied.apart:
            config[tied_weights.KEY] = False
        return cls(
            id,
            path,
            path.name if of_hub else None,  # a snapshot's directory is named after its commit
            config,
            tied.tensors,
            origin,
            tied.twice,
            files.index,
            tuple(note for note in (files.note, tied.note) if note),
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
        if not self.notes:
            return self.path
        from quantkit.linked import linked

        return linked(self)

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
        from quantkit.hf_config import check_repeated, read_config

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
    if not (path / _ADAPTER).is_file() or weights not in ([], ["adapter_model.safetensors"]):
        return
    base = read_object(path / _ADAPTER).get("base_model_name_or_path") or "its base model"
    raise CheckpointError(
        f"{path}: is a LoRA adapter of {base}, not a model; merge it first: "
        "peft.AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(OUT)"
        ", and copy the tokenizer to OUT"
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``directory``: tokenizer.json as it is, with the settings of
    tokenizer_config.json (the special tokens' names, the chat template) around it.

    The class that the settings name is not asked: those of transformers 5 put rules of their own
    in place of the file's, and checkpoints name wrong ones. transformers builds the tokenizer only
    where there is no tokenizer.json. Raise CheckpointError where it cannot be read.
    """
    file = directory / "tokenizer.json"
    load_json(directory / "tokenizer_config.json")  # damaged, it is named
    tokenizer = _as_written(file) if file.is_file() else load_auto_tokenizer(directory)
    if tokenizer.chat_template is None:  # transformers leaves chat_template.json to processors
        tokenizer.chat_template = chat_templates(directory).get(DEFAULT)
    return tokenizer


def _as_written(file: Path) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class Settings(PreTrainedTokenizerFast):  # type: ignore[misc]
        """All but the tokenizer itself: reading a large one and copying it takes seconds."""

        @classmethod
        def convert_to_native_format(cls, **settings: Any) -> dict[str, Any]:
            return {**settings, "tokenizer_object": Tokenizer(models.BPE())}

    try:
        tokenizer: PreTrainedTokenizerBase = Settings.from_pretrained(
            file.parent, local_files_only=True
        )
        # Only now: transformers adds tokens to what it has, and changes their flags.
        tokenizer._tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise CheckpointError(
            f"{file.parent}: unreadable tokenizer: {first_line(error)}"
        ) from error
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
        _require_tokenizer(directory)
        raise CheckpointError(f"{directory}: unreadable tokenizer: {first_line(error)}") from error
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
    return _tensors(weight_files.find(path).files)


def _tensors(shards: Sequence[Path]) -> dict[str, TensorInfo]:
    """All parameters; of those that several shards hold the last, as transformers takes them."""
    found = {
        info.name: info
        for shard in shards
        for info in _index(shard)
        if not (_BUFFER.search(info.name) or (len(info.shape) != 1 and _MASK.search(info.name)))
    }
    if not found:
        raise CheckpointError(f"{shards[0].parent}: its safetensors hold no tensors")
    return found


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
