"""GGUF made by quantkit: from a transformers checkpoint to one file that llama.cpp loads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.models.checkpoint import FORMAT, Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.base import Converted, Plan

if TYPE_CHECKING:
    from quantkit.data.calibration import Calibration


class NativeGGUF:
    """Every type of llama.cpp, made directly from the source, byte for byte as llama.cpp's own
    converter and quantizer would."""

    formats = ("gguf",)
    resumes = False

    def plan(self, checkpoint: Checkpoint, spec: Spec) -> Plan:
        """See ``Producer.plan``. The size is exact (but see ``plan_file`` for ``imatrix: true``);
        the notes name the tensors that get another type than the mix asks for."""
        from quantkit.producers.gguf.options import parse

        scheme, options = parse(spec)
        from quantkit.producers.gguf import fallback, llama_imatrix
        from quantkit.producers.gguf.importance import check_computable
        from quantkit.producers.gguf.plans import plan_file
        from quantkit.producers.gguf.sources import content_of
        from quantkit.producers.proof import tokens
        from quantkit.toolchains.llama_programs import find_llama_imatrix

        converter = fallback.needed(checkpoint)
        counted: tuple[str, ...] = ()
        if options.imatrix is True and converter:
            find_llama_imatrix()
            counted = (llama_imatrix.NOTE,)
        elif options.imatrix is True:
            check_computable(checkpoint)
        content = content_of(checkpoint)
        planned = plan_file(content, scheme, options)
        proved = tokens.of_content(checkpoint, content) if checkpoint.format == FORMAT else None
        found = (*proved.remarks, *proved.differences) if proved else ()
        return Plan(
            spec,
            planned.layout.bytes,
            planned.bits_per_weight(checkpoint.parameters),
            needs_calibration=options.imatrix is True,
            notes=(*content.notes, *counted, *planned.notes, *found),
            tokenizer_differences=tuple(proved.differences) if proved else (),
            options=options.resolved() | fallback.options(checkpoint),
        )

    def convert(
        self, checkpoint: Checkpoint, spec: Spec, calibration: Calibration | None, directory: Path
    ) -> Converted:
        """Write ``<model>-<type>.gguf``, or its parts; see ``Producer.convert``."""
        made = self.convert_many(checkpoint, {spec: directory}, calibration)[spec]
        if isinstance(made, Exception):
            raise made
        return made

    def convert_many(
        self,
        checkpoint: Checkpoint,
        targets: Mapping[Spec, Path],
        calibration: Calibration | None,
    ) -> dict[Spec, Converted | Exception]:
        """All in one pass over the weights; see ``SharesReading``."""
        from quantkit.producers.gguf import conversion, fallback
        from quantkit.producers.gguf.importance import compute, importance
        from quantkit.producers.gguf.sources import content_of
        from quantkit.version import __version__

        if converter := fallback.needed(checkpoint):
            return fallback.convert_many(checkpoint, converter, targets, calibration)
        own, by = partial(compute, checkpoint), f"quantkit {__version__}"
        matrix = partial(importance, checkpoint, compute=own, by=by)
        content = content_of(checkpoint)
        return conversion.convert_many(checkpoint, content, targets, calibration, matrix)
