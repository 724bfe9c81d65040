"""Peak memory of GPTQ and AWQ by the number of blocks.

    python -m tests.benchmarks.memory_by_depth [--blocks 4,16] [--hidden 1024]

A Llama with random weights is made once with each number of equal blocks, and converted by a
command of its own, whose peak of resident memory the manifest keeps. Prints a table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from quantkit.formats.detect import open_variant
from quantkit.models.checkpoint import Checkpoint
from tests.models import make_checkpoint

SPECS = ("gptq:w4g64", "awq:w4g64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", default="4,16")
    parser.add_argument("--hidden", type=int, default=1024)
    given = parser.parse_args()
    print("| blocks | checkpoint MiB | variant | seconds | peak MiB |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for blocks in map(int, given.blocks.split(",")):
            source = make_checkpoint(
                Path(work) / f"{blocks}-blocks",
                hidden_size=given.hidden,
                intermediate_size=3 * given.hidden,
                num_attention_heads=given.hidden // 64,
                num_key_value_heads=given.hidden // 64,
                num_hidden_layers=blocks,
            )
            size = Checkpoint.open(source).bytes / 2**20
            for spec in SPECS:
                manifest = open_variant(convert(source, spec)).manifest
                assert manifest is not None
                made = manifest.convert
                print(
                    f"| {blocks} | {size:.0f} | `{spec}` | {made.seconds:.0f} | "
                    f"{made.peak_rss_bytes / 2**20:.0f} |",
                    flush=True,
                )


def convert(source: Path, spec: str) -> Path:
    """The directory of the variant, made by a command of its own."""
    out = source.with_name(f"{source.name}-variants")
    command = [sys.executable, "-m", "quantkit", "convert", str(source), "--to", spec]
    command += ["--out", str(out), "--samples", "16", "--sequence-length", "512"]
    command += ["--calibration", "pydoc:calibration", "--device", "cpu"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return out / spec.replace(":", "-")


if __name__ == "__main__":
    main()
