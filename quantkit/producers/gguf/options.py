"""What can be asked of a GGUF besides its file type: ``llama-quantize``'s options, as keys."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError, did_you_mean
from quantkit.formats.gguf import file_types
from quantkit.formats.gguf.file_types import TENSOR_TYPES, UNQUANTIZED
from quantkit.models.spec import Spec
from quantkit.system.files import sha256_file

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
"""llama.cpp's tools count in decimal."""


@dataclass(frozen=True)
class Options:
    """The options of one file; the defaults are ``llama-quantize``'s.

    Types are ggml's (``Q6_K``), in capitals.
    """

    pure: bool = False
    """One type for all tensors, instead of the mix that the file type stands for."""
    output_type: str | None = None
    """Type of the output layer; null: as the scheme says."""
    embedding_type: str | None = None
    """Type of the token embedding; null: as the scheme says."""
    tensor_types: tuple[tuple[str, str], ...] = ()
    """Pattern and type: the first pattern that occurs in a tensor's name decides. Patterns are
    C++'s (ECMAScript) regular expressions, in lower case."""
    imatrix: bool | str = False
    """An importance matrix: a file's path, or true to compute one from the calibration text."""
    split_max_size: int | None = None
    """Most bytes of tensors in one file; null: one file."""

    @classmethod
    def of(cls, spec: Spec) -> Options:
        """Raise RecipeError for an unknown option or a value that does not fit."""
        given = spec.known_options([field.name for field in fields(cls)])
        where = f"spec {spec}"
        pure, imatrix = given.get("pure", False), given.get("imatrix", False)
        if not isinstance(pure, bool):
            raise RecipeError(f"{where}: pure is {pure!r}, expected true or false")
        if not isinstance(imatrix, bool) and not (isinstance(imatrix, str) and imatrix):
            raise RecipeError(f"{where}: imatrix is {imatrix!r}, expected true or a file's path")
        if isinstance(imatrix, str) and not Path(imatrix).expanduser().is_file():
            raise RecipeError(f"{where}: imatrix {imatrix}: no such file")
        options = cls(
            pure=pure,
            output_type=_type(where, "output_type", given.get("output_type")),
            embedding_type=_type(where, "embedding_type", given.get("embedding_type")),
            tensor_types=_tensor_types(where, given.get("tensor_types", ())),
            imatrix=imatrix,
            split_max_size=_size(where, given.get("split_max_size")),
        )
        idle = [key for key in ("pure", "tensor_types", "imatrix") if getattr(options, key)]
        if spec.scheme in UNQUANTIZED and idle:
            raise RecipeError(f"{where}: {idle[0]} has no effect on {spec.scheme}; leave it out")
        return options

    def resolved(self) -> dict[str, Any]:
        """Every option as a JSON value; with the file type they decide what the quantizer does."""
        imatrix: Any = self.imatrix
        if isinstance(imatrix, str):
            imatrix = {"file": imatrix, "sha256": sha256_file(Path(imatrix).expanduser())}
        return {
            "pure": self.pure,
            "output_type": self.output_type,
            "embedding_type": self.embedding_type,
            "tensor_types": [list(pair) for pair in self.tensor_types],
            "imatrix": imatrix,
            "split_max_size": self.split_max_size,
        }


def parse(spec: Spec) -> tuple[str, Options]:
    """File type and options; raise RecipeError for what quantkit does not make."""
    return file_types.check(spec), Options.of(spec)


def _type(where: str, key: str, value: Any) -> str | None:
    if value is None:
        return None
    name = str(value).upper()
    if name not in TENSOR_TYPES:
        raise RecipeError(
            f"{where}: {key}: {value!r} is not a type of tensors; they are "
            f"{', '.join(TENSOR_TYPES)}" + did_you_mean(str(value), TENSOR_TYPES)
        )
    return name


def _tensor_types(where: str, value: Any) -> tuple[tuple[str, str], ...]:
    pairs = []
    for pair in value if isinstance(value, tuple) else (value,):
        if not isinstance(pair, tuple) or len(pair) != 2 or not pair[0]:
            raise RecipeError(
                f"{where}: tensor_types: expected patterns and types, such as ffn_down: Q6_K, "
                f"not {pair!r}"
            )
        pattern, kind = str(pair[0]).lower(), _type(where, f"tensor_types.{pair[0]}", str(pair[1]))
        pairs.append((pattern, kind or ""))
    return tuple(pairs)


def _size(where: str, value: Any) -> int | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)([KMG]?)", str(value))
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if size < 1 or isinstance(value, bool):
        raise RecipeError(f"{where}: split_max_size is {value!r}, expected such as 2G or 500M")
    return size
