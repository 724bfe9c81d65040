"""Make GGUF variants of one checkpoint, all in one pass over its weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import ConversionError, QuantkitError, RecipeError
from quantkit.formats.gguf.imatrix import ImportanceMatrix
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import IMATRIX
from quantkit.producers.base import Converted
from quantkit.producers.gguf.content import Content
from quantkit.producers.gguf.options import parse
from quantkit.producers.gguf.plans import plan_file
from quantkit.producers.gguf.writer import Output, write
from quantkit.system.sizes import gibibytes

if TYPE_CHECKING:
    from quantkit.data.calibration import Calibration


def convert_many(
    checkpoint: Checkpoint,
    content: Content,
    targets: Mapping[Spec, Path],
    calibration: Calibration | None,
    importance: Callable[[Calibration], ImportanceMatrix],
) -> dict[Spec, Converted | Exception]:
    """Write each spec's file into its directory, from the ``content`` of ``checkpoint``; see
    ``SharesReading``. ``importance``: computes the matrix of ``imatrix: true``."""

    @cache
    def matrix() -> ImportanceMatrix:
        if calibration is None:
            raise RecipeError("gguf: imatrix: true needs calibration text")
        return importance(calibration)

    outputs: dict[Spec, Output] = {}
    made: dict[Spec, Converted | Exception] = {}
    needed = 0
    for spec, directory in targets.items():
        try:
            scheme, options = parse(spec)
            computed = matrix() if options.imatrix is True else None
            plan = plan_file(content, scheme, options, computed)
            _check_space(directory, plan.layout.bytes, needed)
        except QuantkitError as error:
            made[spec] = error
            continue
        needed += plan.layout.bytes
        outputs[spec] = Output(plan, plan.layout.paths(directory, f"{content.name}-{scheme}"))
        if computed is not None:
            computed.write(directory / IMATRIX)
    if outputs:
        write(content, list(outputs.values()))
    tools = {package: version(package) for package in ("llama-cpp-python", "gguf")}
    for spec, output in outputs.items():
        if output.error is not None:
            made[spec] = _explained(output.error, output, targets[spec])
            continue
        made[spec] = Converted(
            bits_per_weight=output.plan.bits_per_weight(checkpoint.parameters),
            bits_per_weight_quantized=output.plan.bits_per_weight_quantized(),
            tools=tools,
            notes=output.plan.notes,
            sha256=output.sha256,
        )
    return made


def _explained(error: Exception, output: Output, directory: Path) -> Exception:
    if not isinstance(error, OSError):
        return error
    free = gibibytes(shutil.disk_usage(directory).free)
    explained = ConversionError(
        f"gguf: writing {output.paths[0].name} failed: {error}; it takes "
        f"{gibibytes(output.plan.layout.bytes)} in {directory.parent}, where {free} are free"
    )
    explained.__cause__ = error
    return explained


def _check_space(directory: Path, size: int, taken: int) -> None:
    """``taken`` are the bytes that files of the same pass will take there."""
    free = shutil.disk_usage(directory).free - taken
    if free < size:
        raise ConversionError(
            f"gguf: {directory.parent} has {gibibytes(free)} free, and the conversion takes "
            f"{gibibytes(size)}; make room or choose another --out"
        )
