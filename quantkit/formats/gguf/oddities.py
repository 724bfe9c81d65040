"""What is odd about a GGUF: one small check each, in the order in which they are reported.

They come from what llama.cpp's reader refuses or warns of, and from how files go wrong on their
way: cut off, mislabelled, converted without a tokenizer's details. Not all are defects.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from quantkit.formats.gguf import file_types, ggml
from quantkit.formats.gguf.ggml import TensorType
from quantkit.formats.gguf.header import ALIGNMENT, Header, padded
from quantkit.formats.gguf.model_file import (
    ModelFile,
    StoredTensor,
    group_of,
    stored_bytes,
    type_name,
)
from quantkit.formats.gguf.samples import suspicious

_REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
"""Tensor types that llama.cpp had once."""

_MATRIX = re.compile(
    r"(token_embd|output|blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps|_shexp)?))"
    r"\.weight"
)
"""What a mix of llama.cpp always quantizes."""

_MIX_TYPES = {"IQ2_M": "IQ2_S", "IQ2_S": "IQ2_XS", "IQ3_M": "IQ3_S", "IQ3_XS": "IQ3_S"}
"""The type that a mix is mostly of, where it is not in the mix's name."""

_SUPER_BLOCK = 256
_MIX_BITS = 6.6
"""Bits per weight; the largest type that llama.cpp's mixes use is Q6_K, of 6.5625."""

_NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
"""Types that llama.cpp refuses to make in a block without an importance matrix."""

_CHAT = re.compile(r"(^|[^a-z])(instruct|chat|it)([^a-z]|$)", re.IGNORECASE)

_NAMED = 4
"""Groups of tensors that a line names."""

_NO_TOKENIZER = ("adapter", "imatrix", "mmproj", "vocab")
"""Values of ``general.type`` that are not whole models."""


def oddities(model: ModelFile) -> list[str]:
    """One line each; empty for most files that llama.cpp makes today."""
    found = [*_parts(model), *_container(model), *_tensors(model)]
    if model.metadata.get("general.type") not in _NO_TOKENIZER:
        found += [*_hyperparameters(model), *_tokenizer(model), *_mix(model)]
    return [*found, *_values(model)]


def _parts(model: ModelFile) -> Iterator[str]:
    if model.missing:
        yield f"{len(model.missing)} of its parts are missing here: {_some(model.missing)}"
        return
    expected = model.metadata.get("split.tensors.count", len(model.tensors))
    if expected != len(model.tensors):
        yield f"its parts hold {len(model.tensors)} tensors, split.tensors.count says {expected}"


def _container(model: ModelFile) -> Iterator[str]:
    for file, header in zip(model.files, model.headers, strict=True):
        if header.version != 3:
            yield f"{file.name}: GGUF version {header.version}, which nothing writes since 2023"
        if header.alignment != ALIGNMENT:
            yield f"{file.name}: general.alignment is {header.alignment}, usually {ALIGNMENT}"
        yield from _extent(file, header, [t for t in model.tensors if t.file == file])


def _extent(file: Path, header: Header, tensors: list[StoredTensor]) -> Iterator[str]:
    """Whether the tensors lie one after another, as llama.cpp demands, and fill the file."""
    end = next_start = header.data_offset
    for tensor in tensors:
        if tensor.start != next_start:
            yield f"{file.name}: {tensor.name} does not lie where the tensor before it ends"
            return
        if ggml.numbered(tensor.type) is None:
            return  # nobody knows where it ends
        end = next_start + stored_bytes(tensor)
        next_start = header.data_offset + padded(end - header.data_offset, header.alignment)
    actual = file.stat().st_size
    if tensors and actual < end:
        yield f"{file.name}: cut off, {end - actual} bytes are missing; download it again"
    elif tensors and actual > next_start:
        yield f"{file.name}: {actual - next_start} bytes after the last tensor"


def _tensors(model: ModelFile) -> Iterator[str]:
    counts = Counter(tensor.name for tensor in model.tensors)
    if twice := [name for name, count in counts.items() if count > 1]:
        yield f"{_some(twice)}: more than once, which llama.cpp refuses"
    if empty := [tensor.name for tensor in model.tensors if 0 in tensor.shape]:
        yield f"{_some(empty)}: of no elements"
    for number in sorted({tensor.type for tensor in model.tensors}):
        named = [tensor for tensor in model.tensors if tensor.type == number]
        names = _some(tensor.name for tensor in named)
        kind = ggml.numbered(number)
        if number in _REMOVED:
            yield f"{names}: {_REMOVED[number]}, which llama.cpp no longer reads"
        elif kind is None:
            yield f"{names}: tensor type {number}, which this version of llama.cpp does not know"
        elif bad := [t.name for t in named if t.shape and t.shape[-1] % kind.block]:
            yield f"{_some(bad)}: columns do not divide by {kind.block}, the block of {kind.name}"


def _hyperparameters(model: ModelFile) -> Iterator[str]:
    metadata, architecture = model.metadata, model.architecture
    if architecture is None:
        yield "no general.architecture, without which nothing loads it"
    elif model.tensors:
        if "general.file_type" not in metadata:
            yield "no general.file_type: the mix of its types has no name"
        blocks = metadata.get(f"{architecture}.block_count")
        found = {m[1] for t in model.tensors if (m := re.match(r"blk\.(\d+)\.", t.name))}
        if found and len(found) != blocks and not model.missing:
            yield f"tensors of {len(found)} blocks, {architecture}.block_count says {blocks}"
        if f"{architecture}.context_length" not in metadata:
            yield f"no {architecture}.context_length"


def _tokenizer(model: ModelFile) -> Iterator[str]:
    metadata = model.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        yield "no tokenizer"
        return
    if kind == "gpt2" and metadata.get("tokenizer.ggml.pre", "default") == "default":
        yield "no pre-tokenizer is named: llama.cpp splits text by its default and warns of it"
    if kind in ("gpt2", "llama", "t5") and "tokenizer.ggml.eos_token_id" not in metadata:
        yield "no end-of-sequence token is named"
    if "tokenizer.chat_template" not in metadata:
        keys = ("general.name", "general.basename", "general.finetune")
        names = [model.name, *(str(metadata[key]) for key in keys if key in metadata)]
        for chat in filter(_CHAT.search, names):
            yield f"no chat template, though it is called {chat!r}"
            break
    tokens = model.array("tokenizer.ggml.tokens")
    if tokens:
        yield from _token_counts(model, len(tokens))


def _token_counts(model: ModelFile, tokens: int) -> Iterator[str]:
    for key, value in model.metadata.items():
        if re.fullmatch(r"tokenizer\.ggml\.\w+_token_id", key) and value not in range(tokens):
            yield f"{key} is {value}, there are {tokens} tokens"
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if key in model.metadata and len(model.array(key)) != tokens:
            yield f"{key} has {len(model.array(key))} entries, there are {tokens} tokens"
    for tensor in model.tensors:
        if tensor.name == "token_embd.weight" and tensor.shape[:1] != (tokens,):
            yield f"{tensor.name} has {tensor.shape[0]} rows, there are {tokens} tokens"


def _mix(model: ModelFile) -> Iterator[str]:
    """Types that the name of the mix does not promise, and an importance matrix not named."""
    metadata = model.metadata
    scheme = file_types.name_of(metadata.get("general.file_type"))
    main = _main_type(scheme)
    if main is None:
        return
    matrices = [t for t in model.tensors if len(t.shape) > 1 and _MATRIX.fullmatch(t.name)]
    others = [t for t in matrices if t.type != main.number]
    fitting = [t for t in others if t.shape[-1] % _block(t, main) == 0]
    narrow = [t for t in others if t.shape[-1] % _block(t, main)]
    for columns in sorted({t.shape[-1] for t in narrow}):
        same = [t for t in narrow if t.shape[-1] == columns]
        types = ", ".join(sorted({type_name(t.type) for t in same}))
        yield (
            f"{_some(t.name for t in same)}: {types} in a file called {scheme}, as {columns} "
            f"columns do not divide by {_block(same[0], main)}"
        )
    usual = max(_MIX_BITS, main.bytes * 8 / main.block)
    for number in sorted({t.type for t in fitting}):
        kind = ggml.numbered(number)
        # llama.cpp keeps the small k and v of mixtures of experts in Q8_0.
        experts = kind and kind.name == "Q8_0" and f"{model.architecture}.expert_count" in metadata
        if kind is None or experts or kind.bytes * 8 / kind.block <= usual:
            continue
        yield (
            f"{_some(t.name for t in fitting if t.type == number)}: {kind.name} in a file called "
            f"{scheme}, more than llama.cpp's own mix takes"
        )
    if matrices and len(matrices) == len(fitting):
        yield f"called {scheme} by general.file_type, and no tensor is {main.name}"
    weighed = [t.name for t in matrices if type_name(t.type) in _NEED_IMATRIX]
    if weighed and "quantize.imatrix.entries_count" not in metadata:
        yield f"{_some(weighed)}: of a type that takes an importance matrix, and none is named"


def _main_type(scheme: str) -> TensorType | None:
    """What a mix is mostly of; None where it is not quantized, or takes what it finds."""
    if scheme in (*file_types.UNQUANTIZED, "MXFP4_MOE"):
        return None
    name = _MIX_TYPES.get(scheme, scheme)
    return ggml.types().get(name) or ggml.types().get(name.rpartition("_")[0])


def _block(tensor: StoredTensor, main: TensorType) -> int:
    """What columns must divide by for the tensor to get the type that the mix means it to have:
    the outer ones are of Q6_K or the like in every mix but the largest."""
    return main.block if tensor.name.startswith("blk.") or main.name == "Q8_0" else _SUPER_BLOCK


def _values(model: ModelFile) -> Iterator[str]:
    not_finite, zero = suspicious(model)
    if not_finite:
        yield f"{_some(not_finite)}: NaN or infinity among the values that were looked at"
    if zero:
        yield f"{_some(zero)}: zero wherever it was looked at, as after an unfinished download"


def _some(names: Iterable[str]) -> str:
    """``blk.*.attn_q.weight (30 tensors), output.weight``."""
    groups = Counter(map(group_of, names))
    first = [f"{g} ({n} tensors)" if n > 1 else g for g, n in list(groups.items())[:_NAMED]]
    left = len(groups) - len(first)
    return ", ".join(first) + (f" and {left} more" if left else "")
