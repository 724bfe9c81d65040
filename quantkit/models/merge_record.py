"""What a checkpoint was merged from: a file beside its weights, and a part of every manifest."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from quantkit.errors import CheckpointError
from quantkit.system.files import write_json

_FILE = "quantkit_merge.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PartRecord(_Record):
    """A base or an adapter; ``sha256`` by path in its directory."""

    id: str
    revision: str | None
    sha256: dict[str, str]


class MergeRecord(_Record):
    """A LoRA adapter that was merged into a base. ``origin``: that in a sentence; ``notes``: that,
    and what else a reader should know."""

    base: PartRecord
    adapter: PartRecord
    origin: str
    notes: list[str]

    @classmethod
    def of(cls, directory: Path) -> MergeRecord | None:
        """Of a merged checkpoint's directory; None of any other."""
        file = directory / _FILE
        if not file.is_file():
            return None
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            raise CheckpointError(
                f"{file}: not what quantkit writes about a merge: {error.errors()[0]['msg']}"
            ) from error

    def write(self, directory: Path) -> None:
        """Beside the weights of a merged checkpoint."""
        write_json(directory / _FILE, self.model_dump(mode="json"))
