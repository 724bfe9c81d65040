r"""GPTQ and AWQ against rounding to nearest and against their peers: drift, seconds, memory.

    python -m tests.benchmarks.quantizer_quality --calibration c4.utf8 --text wiki.raw \
        --text code.utf8 --work DIR

One row after another is made of the source, each by a command of its own, on the same token
ids of the same text, and scored on the same windows. A peer's row is left out where its toolchain
is not installed (`quantkit engines install auto-round`). What is in DIR already is scored again but
not made again. Standard errors are over tokens; the ratios are against the rounding that has the
same grid (symmetric for GPTQ, asymmetric for AWQ), on the mean of the texts and on the worst.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantkit import toolchains
from quantkit.checkpoint import Checkpoint
from quantkit.errors import ToolchainError
from quantkit.evaluate import evaluate
from quantkit.evaluate.reference import Reference
from quantkit.quantize.awq import Grid
from quantkit.quantize.gptq import plain_symmetric
from quantkit.recipe import EvaluateSection
from quantkit.stages import evaluation_plan
from quantkit.texts import load_text
from quantkit.threads import spin_briefly
from quantkit.variant import Model, open_variant

BITS, GROUP_SIZE = 4, 64


@dataclass(frozen=True)
class Row:
    """One way to make a variant; ``flags`` of `quantkit convert`, none for rounding to nearest."""

    label: str
    format: str
    flags: tuple[str, ...] = ()
    producer: str | None = None
    samples: int = 64
    length: int = 512


_LEARNED = ("--rounding", "learned", "--iters", "50")
ROWS = {
    "rtn-symmetric": Row("rounding, symmetric", "gptq"),
    "gptq": Row("GPTQ", "gptq"),
    "gptq-learned": Row("GPTQ, learned", "gptq", _LEARNED),
    "autoround": Row("AutoRound, iters 0", "gptq", ("--producer-arg", "iters=0"), "auto-round"),
    "autoround-tuned": Row(
        "AutoRound, iters 50", "gptq", ("--producer-arg", "iters=50"), "auto-round", 32, 256
    ),
    "rtn-asymmetric": Row("rounding, asymmetric", "awq"),
    "awq": Row("AWQ", "awq"),
    "awq-learned": Row("AWQ, learned", "awq", _LEARNED),
    "autoawq": Row("AutoAWQ", "awq", (), "autoawq"),
}
_ROUNDING = {"gptq": "rtn-symmetric", "awq": "rtn-asymmetric"}


def rounded(
    source: Checkpoint, fake: Callable[[torch.Tensor], torch.Tensor], out: Path
) -> Checkpoint:
    """The source with every linear of every block rounded to nearest, as a plain checkpoint."""
    out.mkdir()
    state = {
        name: fake(source.read(name).float()) if name.endswith("proj.weight") else source.read(name)
        for name in source.tensors
    }
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    for file in (*source.sidecars, source.path / "config.json"):
        shutil.copy(file, out)
    return Checkpoint.open(out)


def make(name: str, model: str, calibration: str, work: Path) -> Model | None:
    """The row's variant of ``model``, made now or found in ``work``.

    None where its toolchain is not there.
    """
    row, directory = ROWS[name], work / name
    if name in _ROUNDING.values():
        shutil.rmtree(directory, ignore_errors=True)
        source = Checkpoint.open(model)
        grid = Grid(BITS, GROUP_SIZE, source.dtype)
        symmetric = row.format == "gptq"

        def fake(weights: torch.Tensor) -> torch.Tensor:
            if symmetric:
                return plain_symmetric(weights, BITS, GROUP_SIZE, source.dtype).dequantize()
            return grid.fake(weights)

        return rounded(source, fake, directory)
    if row.producer:
        try:
            toolchains.find(row.producer)
        except ToolchainError as error:
            print(f"{row.label}: {error}", file=sys.stderr)
            return None
    if not directory.is_dir() or not any(directory.iterdir()):
        command = [sys.executable, "-m", "quantkit", "convert", model]
        command += ["--to", f"{row.format}:w{BITS}g{GROUP_SIZE}", "--out", str(directory)]
        command += ["--calibration", calibration, "--device", "cpu", *row.flags]
        command += ["--samples", str(row.samples), "--sequence-length", str(row.length)]
        command += ["--producer", row.producer] if row.producer else []
        subprocess.run(command, check=True, stdout=sys.stderr)
    (made,) = directory.iterdir()
    return open_variant(made)


def main() -> None:
    """Print the table, each row when it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="demo:smollm2-135m")
    parser.add_argument("--text", action="append", help="several times, for several texts")
    parser.add_argument("--calibration", default="pydoc:calibration")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--rows", default=",".join(n for n in ROWS if "learned" not in n), help=", ".join(ROWS)
    )
    options = parser.parse_args()
    names = [name for name in ROWS if name in options.rows.split(",")]
    names = [n for n in ROWS if n in names or n in {_ROUNDING[ROWS[m].format] for m in names}]
    options.work.mkdir(parents=True, exist_ok=True)
    source = Checkpoint.open(options.source)
    plans, references = {}, {}
    for text in options.text or ["pydoc:evaluation"]:
        section = EvaluateSection(text=text, windows=options.windows)
        plan = evaluation_plan(section, source, load_text(text))
        assert plan.windows is not None
        name = Path(text).name
        plans[name], references[name] = plan, Reference.build(source, plan.windows, options.work)
    print(f"\n{options.windows} windows of 512 of each text; from {options.calibration}\n")
    print("| | calibration |", *(f"{name}: KLD (ppl) |" for name in plans), end=" ")
    print("mean of ratios to rounding | worst | seconds | peak GiB |")
    print("| --- " * (len(plans) + 6) + "|", flush=True)
    lost: dict[str, dict[str, float]] = {}
    for name in names:
        model, row = make(name, options.source, options.calibration, options.work), ROWS[name]
        if model is None:
            continue
        cells, lost[name] = [], {}
        for text, plan in plans.items():
            found = evaluate(model, references[text], plan).metrics
            kld, ppl = found["kld_mean"], found["ppl"]
            lost[name][text] = kld.value
            cells.append(f"{kld.value:.4f} ± {kld.stderr:.4f} ({ppl.value:.2f}) |")
        manifest = getattr(model, "manifest", None)
        tokens, cost, change = "–", "– | –", "– | –"
        if manifest:
            tokens = f"{row.samples} x {row.length}"
            peak = manifest.convert.peak_rss_bytes / 2**30
            cost = f"{manifest.convert.seconds:.0f} | {peak:.2f}"
            plain = lost[_ROUNDING[row.format]]
            ratios = [lost[name][text] / plain[text] for text in plans]
            change = f"{sum(ratios) / len(ratios):.2f} | {max(ratios):.2f}"
        print(f"| {row.label} | {tokens} |", *cells, f"{change} | {cost} |", flush=True)


if __name__ == "__main__":
    spin_briefly()
    main()
