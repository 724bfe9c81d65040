"""GGUF, llama.cpp's format: from a transformers checkpoint to one file that llama.cpp loads."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Checkpoint
from quantkit.errors import ConversionError
from quantkit.formats.base import Converted, Plan
from quantkit.formats.gguf import file_types
from quantkit.formats.gguf.file_types import UNQUANTIZED
from quantkit.formats.gguf.header import read_header
from quantkit.spec import Spec
from quantkit.variant import Variant

if TYPE_CHECKING:
    from quantkit.calibration import Calibration
    from quantkit.formats.gguf.sizes import Sizes


def file_type(path: Path) -> str:
    """The scheme of a GGUF file on disk, from its ``general.file_type``: ``Q4_K_M``."""
    return file_types.name_of(read_header(path).metadata.get("general.file_type"))


class GGUF:
    """F32, F16 and BF16 are written here; llama.cpp makes every other type from one of them."""

    name = "gguf"

    def plan(self, checkpoint: Checkpoint, spec: Spec) -> Plan:
        """See ``Format.plan``. The size is exact; the notes name the tensors that get another
        type than the mix asks for."""
        sizes = self._predict(checkpoint, file_types.check(spec))
        return Plan(
            spec,
            sizes.file_bytes,
            sizes.bits_per_weight(checkpoint.parameters),
            needs_calibration=False,
            notes=sizes.notes,
        )

    def convert(
        self,
        checkpoint: Checkpoint,
        spec: Spec,
        calibration: Calibration | None,  # noqa: ARG002  needed by importance matrices only
        directory: Path,
    ) -> Converted:
        """Write ``<model>-<type>.gguf``; see ``Format.convert``.

        A quantized file is made from an unquantized one beside it, in the checkpoint's own
        precision so that nothing is lost on the way, which is deleted at the end.
        """
        from quantkit.formats.gguf import quantize, sizes, writer

        scheme = file_types.check(spec)
        base = _base(checkpoint, scheme)
        predicted = self._predict(checkpoint, scheme)
        _check_space(directory, predicted.work_bytes)
        target = directory / f"{writer.model_name(checkpoint)}-{scheme}.gguf"
        unquantized = target if scheme == base else directory / "unquantized.gguf"
        try:
            writer.write(checkpoint, base, unquantized)
            if scheme != base:
                quantize.quantize(unquantized, target, scheme, len(predicted.tensors))
        except OSError as error:
            free = _gib(shutil.disk_usage(directory).free)
            raise ConversionError(
                f"gguf: writing {target.name} failed: {error}; it takes "
                f"{_gib(predicted.work_bytes)} in {directory.parent}, where {free} are free"
            ) from error
        finally:
            if scheme != base:
                unquantized.unlink(missing_ok=True)
        made = sizes.measure(target)
        return Converted(
            bits_per_weight=made.bits_per_weight(checkpoint.parameters),
            bits_per_weight_quantized=made.bits_per_weight_quantized(),
            options={"quantized_from": base} if scheme != base else {},
            tools={package: version(package) for package in ("llama-cpp-python", "gguf")},
            notes=predicted.notes,
        )

    def inspect(self, variant: Variant) -> dict[str, Any]:
        """What the file says about itself; see ``Format.inspect``."""
        from quantkit.formats.gguf import sizes

        metadata = read_header(variant.weights).metadata
        tensors = sizes.measure(variant.weights).tensors
        architecture = metadata.get("general.architecture")
        types = sorted({tensor.type for tensor in tensors})
        return {
            "name": metadata.get("general.name"),
            "architecture": architecture,
            "file_type": file_types.name_of(metadata.get("general.file_type")),
            "parameters": sum(tensor.numel for tensor in tensors),
            "context_length": metadata.get(f"{architecture}.context_length"),
            "tokenizer": metadata.get("tokenizer.ggml.model"),
            "pre_tokenizer": metadata.get("tokenizer.ggml.pre"),
            "vocabulary": len(metadata.get("tokenizer.ggml.tokens", [])),
            "chat_template": "tokenizer.chat_template" in metadata,
            "tensors": len(tensors),
            "tensor_types": {
                kind: {
                    "tensors": sum(tensor.type == kind for tensor in tensors),
                    "bytes": sum(tensor.bytes for tensor in tensors if tensor.type == kind),
                }
                for kind in types
            },
        }

    def _predict(self, checkpoint: Checkpoint, scheme: str) -> Sizes:
        from quantkit.formats.gguf import architectures

        architectures.architecture_of(checkpoint)  # before anything slow is imported
        from quantkit.formats.gguf import sizes

        found = sizes.predict(checkpoint, scheme, _base(checkpoint, scheme))
        return replace(found, notes=(*_caveats(checkpoint), *found.notes))


def _caveats(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What llama.cpp computes differently, and does not refuse."""
    config = checkpoint.hf_config
    window = getattr(config, "sliding_window", None)
    if not window or window >= config.max_position_embeddings:
        return ()
    return (f"llama.cpp attends to the whole context, not to a sliding window of {window} tokens",)


def _base(checkpoint: Checkpoint, scheme: str) -> str:
    """What is written first: the scheme itself, or for a quantized one all that the checkpoint
    holds: its own 16-bit type, F32 where it has several."""
    if scheme in UNQUANTIZED:
        return scheme
    dtypes = {info.dtype for info in checkpoint.tensors.values() if len(info.shape) > 1}
    only = dtypes.pop() if len(dtypes) == 1 else "F32"
    return only if only in UNQUANTIZED else "F32"


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConversionError(
            f"gguf: {directory.parent} has {_gib(free)} free, and the conversion takes "
            f"{_gib(needed)}; make room or choose another --out"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
