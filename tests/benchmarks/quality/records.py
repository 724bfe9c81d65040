"""One measured variant, as a line of a JSON lines file."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tests.benchmarks.quality.oracle import Scores


class Record(BaseModel):
    """What was made, of what, by whom, and how it scored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    method: str
    scheme: str
    """``w4g64``, or a type of llama.cpp's."""
    maker: str
    """Who made it, with the version or commit."""
    calibration: str
    """Kinds and size; empty where nothing is calibrated."""
    iters: int | None
    """Steps of learning for each block, where rounding is learned."""
    scored: str
    """Windows and context, and the hash of all scored ids."""
    texts: dict[str, Scores]
    bits_per_weight: float
    """Of all tensors."""
    bits_per_weight_quantized: float | None
    """Of the quantized linears."""
    seconds: float | None
    device: str

    @property
    def key(self) -> tuple[object, ...]:
        """What it is, so that it is not made again."""
        return (
            self.model, self.method, self.scheme, self.maker, self.calibration, self.iters,
            self.scored,
        )  # fmt: skip


def read(files: list[Path]) -> list[Record]:
    """All records of the files that exist; of the same variant the last."""
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    found = [Record.model_validate_json(line) for line in lines]
    return list({record.key: record for record in found}.values())


def append(file: Path, record: Record) -> None:
    """Add one line."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(record.model_dump_json() + "\n")
