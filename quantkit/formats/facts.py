"""What a model on disk is: for a reader, whatever its format."""

from __future__ import annotations

from typing import Any

from quantkit.formats import format_of
from quantkit.models.variant import Model, Variant
from quantkit.system.table import Table, Tabular


class Facts(Tabular, dict[str, Any]):
    """The facts by name, as JSON values; in print only those that are a single value."""

    def table(self) -> Table:
        """See ``Tabular``."""
        single = (str, int, float)
        return Table(("fact", "value"), tuple((k, v) for k, v in self.items() if type(v) in single))


def facts(model: Model) -> Facts:
    """The facts of a checkpoint, a variant, or weights made by somebody else."""
    found = format_of(model).inspect(model)
    if not isinstance(model, Variant):
        return Facts(kind="checkpoint", **found)
    kind = "variant" if model.manifest else "weights without a manifest"
    told = Facts(kind=kind, format=model.format, scheme=model.scheme, **found)
    if model.manifest:
        lines = [line for record in model.manifest.proof.values() for line in record.differences]
        told["oddities"] = [*told.get("oddities", []), *lines]
        told["manifest"] = model.manifest.model_dump(mode="json", exclude={"files"})
    return told
