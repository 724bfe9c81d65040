"""What variants are compared with: the source's final hidden states and its output layer.

Its logits would be large (34 GiB for a Llama 3 8B on WikiText-2, in 16 bits each). The hidden
states of the scored positions are 1.9 GiB, and their product with the output layer gives the same
logits again, exactly but for float32 rounding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors.torch import load, save

from quantkit.engines.base import config_of
from quantkit.errors import EvaluationError
from quantkit.evaluation.hidden_states import HiddenStates, write_window
from quantkit.evaluation.perplexity import Windows
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.engine_config import EngineConfig
from quantkit.system.files import replacing, sha256_json
from quantkit.system.home import home
from quantkit.system.progress import track

if TYPE_CHECKING:
    from quantkit.engines.transformers import TransformersScorer
    from quantkit.models.variant import Model

_VERSION = 3
"""Raised when what is stored changes: it is part of the key."""
_ROOM = 8 << 30
"""Bytes of references in quantkit's home; the least recently used make room for new ones."""
_ABOUT, _OUTPUT = "about.json", "output.safetensors"


class OfSource:
    """What was computed from a source with the digest ``source`` and the layer ``output``."""

    source: str
    output: torch.Tensor

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer: the tokenizer's size, often padded."""
        return self.output.shape[0]

    def is_of(self, model: Model) -> bool:
        """Whether ``model`` is the source that this was computed from."""
        return isinstance(model, Checkpoint) and digest(model) == self.source


@dataclass(frozen=True)
class Reference(OfSource):
    """The source's next-token distributions at every scored position of ``windows``.

    ``hidden``: of each window ``(scored, hidden)``, read when it is asked for; ``output``:
    ``(vocabulary, hidden)``; both float32. ``source``: digest of the source's files; ``engine``:
    what computed it.
    """

    source: str
    engine: EngineConfig
    windows: Windows
    hidden: Sequence[torch.Tensor]
    output: torch.Tensor

    @classmethod
    def build(
        cls, checkpoint: Checkpoint, windows: Windows, cache_dir: Path | None = None
    ) -> Reference:
        """That of one text; see ``of_texts``."""
        return cls.of_texts(checkpoint, {"": windows}, cache_dir)[""]

    @classmethod
    def of_texts(
        cls, checkpoint: Checkpoint, texts: Mapping[str, Windows], cache_dir: Path | None = None
    ) -> dict[str, Reference]:
        """Run the source once on all texts; found again in ``cache_dir``, each text for itself, by
        the hash of all that it depends on. They share one output layer.

        Without a ``cache_dir`` they are kept in quantkit's home, as long as there is room. Raise
        EvaluationError where the source itself gives non-finite values.
        """
        if not texts:
            return {}
        source, engine, device = computed_by(checkpoint)
        directory = cache_dir or home() / "references"
        paths = {}
        for name, windows in texts.items():
            key = sha256_json([_VERSION, source, str(engine), device, windows.protocol()])
            paths[name] = directory / f"reference-{key[:16]}.zip"
        missing = [(texts[name], path) for name, path in paths.items() if not path.is_file()]
        if missing:
            _compute(checkpoint, missing)
        found: dict[str, Reference] = {}
        output = None
        for name, windows in texts.items():
            hidden, output = _read(paths[name], checkpoint, len(windows.ids), output)
            found[name] = cls(source, engine, windows, hidden, output)
        if cache_dir is None:
            _make_room(paths.values())
        return found

    def logits(self, window: int) -> torch.Tensor:
        """``(scored, vocabulary) float32`` of one window."""
        return self.hidden[window] @ self.output.T


def computed_by(checkpoint: Checkpoint) -> tuple[str, EngineConfig, str]:
    """Digest of the source, the engine that computes for it, and on which device, which
    decides on the precision."""
    from quantkit.engines import scoring_engine

    engine = scoring_engine(checkpoint)
    engine.check(checkpoint)
    return digest(checkpoint), config_of(engine), "cuda" if torch.cuda.is_available() else "cpu"


def digest(checkpoint: Checkpoint) -> str:
    """One digest for all files of a checkpoint."""
    return sha256_json(checkpoint.sha256)


def _compute(checkpoint: Checkpoint, wanted: Sequence[tuple[Windows, Path]]) -> None:
    from quantkit.engines.transformers import TransformersScorer

    context = max(windows.context for windows, _ in wanted)
    with TransformersScorer(checkpoint, context) as scorer:
        for windows, path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial, partial.open("wb") as file:
                with ZipFile(file, "w") as archive:
                    _write(checkpoint, windows, archive, scorer)
                file.flush()
                os.fsync(file.fileno())


def _write(
    checkpoint: Checkpoint, windows: Windows, archive: ZipFile, scorer: TransformersScorer
) -> None:
    count = len(windows.ids)
    bad = 0
    states = scorer.hidden_states(windows.ids, [windows.first] * count)
    for index, rows in enumerate(track(states, "reference: windows", count)):
        scored = rows[: windows.scored]
        bad += int((~scored.isfinite().all(-1)).sum())
        write_window(archive, index, scored)
    output = scorer.output_weight
    if bad or not output.isfinite().all():
        raise EvaluationError(
            f"{checkpoint.path}: the reference's own logits are not finite ({bad} of "
            f"{count * windows.scored} positions); nothing can be compared with it"
        )
    name = tensor_of(checkpoint, output)
    about: dict[str, Any] = {"hidden": output.shape[1], "output": name}
    archive.writestr(_ABOUT, json.dumps(about))
    if name is None:
        archive.writestr(_OUTPUT, save({"output": output.contiguous()}))


def tensor_of(checkpoint: Checkpoint, output: torch.Tensor) -> str | None:
    """The tensor of the checkpoint that is the output layer, so that it is not stored twice; None
    where it is none of them (transformers changed it)."""
    for name, info in checkpoint.tensors.items():
        if info.shape == output.shape and torch.equal(checkpoint.read(name).float(), output):
            return name
    return None


def _read(
    path: Path, checkpoint: Checkpoint, count: int, output: torch.Tensor | None
) -> tuple[HiddenStates, torch.Tensor]:
    """The hidden states, and the output layer, which is read unless it is known already."""
    try:
        with ZipFile(path) as archive:
            about = json.loads(archive.read(_ABOUT))
            name = about["output"]
            if output is None and name is None:
                output = load(archive.read(_OUTPUT))["output"]
    except (BadZipFile, KeyError) as error:
        raise EvaluationError(f"{path}: damaged ({error}); delete it and run again") from error
    hidden = HiddenStates(path, count, about["hidden"])
    return hidden, checkpoint.read(name).float() if output is None else output


def _make_room(used: Collection[Path]) -> None:
    """Remove what was not used for longest, never any of ``used``."""
    for file in used:
        os.utime(file)
    files = {}
    for file in next(iter(used)).parent.iterdir():
        with suppress(FileNotFoundError):  # another process made room
            files[file] = file.stat()
    total = 0
    for file in sorted(files, key=lambda file: files[file].st_mtime_ns, reverse=True):
        total += files[file].st_size
        if total > _ROOM and file not in used:
            file.unlink(missing_ok=True)
