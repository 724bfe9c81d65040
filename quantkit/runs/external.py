"""Variants that somebody else made, in a recipe: measured where they lie, never copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError
from quantkit.evaluation.tokenizer_match import require_same_tokens
from quantkit.formats import load_format
from quantkit.formats.detect import open_variant
from quantkit.models import hub
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.gguf_files import SUFFIX
from quantkit.models.spec import check_name
from quantkit.models.variant import Variant


@dataclass(frozen=True)
class ExternalVariant:
    """An entry ``{path: ./their-awq}``: a directory, a GGUF file, or ``org/name[@revision]``."""

    path: str
    name: str | None = None

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any]) -> ExternalVariant:
        """Raise RecipeError for anything but a ``path`` and a ``name``."""
        more = [key for key in entry if key not in ("path", "name")]
        if more:
            raise RecipeError(
                f"path {entry['path']}: is measured as it is, so it takes no `{more[0]}`"
            )
        if not isinstance(entry["path"], str) or not entry["path"]:
            raise RecipeError(f"path {entry['path']!r}: expected a directory, a file or a hub id")
        found = cls(entry["path"], entry.get("name"))
        check_name(found.directory)
        return found

    @property
    def directory(self) -> str:
        """Its id in a ledger, which is the name of what is kept of its results."""
        path = self.path.partition("@")[0] if self._on_hub else self.path
        file = Path(path)
        return self.name or (file.stem if file.suffix.lower() == SUFFIX else file.name)

    @property
    def _on_hub(self) -> bool:
        return not self._local.exists() and hub.names_hub(self.path)

    @property
    def _local(self) -> Path:
        return Path(self.path).expanduser()

    def check(self, source: Checkpoint) -> None:
        """Raise RecipeError where there is no such path, and what ``open`` raises where it is here;
        the hub is not asked."""
        if not self._local.exists() and not self._on_hub:
            raise RecipeError(f"path {self.path}: no such directory or file, and not a hub id")
        if not self._on_hub:
            found = self.open(source)
            load_format(found.format).bits_per_weight(found, source)

    def open(self, source: Checkpoint) -> Variant:
        """The variant under its name here; what a manifest says of it is ignored.

        Raise CheckpointError or IncompatibleVariant for what is not read, EvaluationError where its
        tokenizer is not the source's.
        """
        path = hub.download(self.path) if self._on_hub else self._local
        found = replace(open_variant(path), id=self.directory, manifest=None)
        require_same_tokens(source, found)
        return found

    def __str__(self) -> str:
        return self.path
