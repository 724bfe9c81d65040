"""GPTQ and AWQ against round-to-nearest at the same scheme: KL divergence, seconds, memory.

    python -m tests.benchmarks.quantizer_quality [--text FILE]... [--calibration TEXT]

Everything is made from the demo source with 32 x 512 calibration tokens and scored on the same
windows. Standard errors are over tokens; the reduction is against the rounding that has the same
grid (symmetric for GPTQ, asymmetric for AWQ).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantkit.calibration import calibrate
from quantkit.checkpoint import Checkpoint
from quantkit.convert import convert
from quantkit.evaluate import evaluate
from quantkit.evaluate.reference import Reference
from quantkit.quantize.awq import Grid
from quantkit.quantize.gptq import plain_symmetric
from quantkit.recipe import EvaluateSection
from quantkit.spec import Spec
from quantkit.stages import evaluation_plan
from quantkit.texts import load_text
from quantkit.threads import spin_briefly
from quantkit.variant import Model

BITS, GROUP_SIZE = 4, 64


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


def main() -> None:
    """Print one table a text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", action="append", help="Default: pydoc:evaluation.")
    parser.add_argument("--calibration", default="pydoc:calibration")
    parser.add_argument("--windows", type=int, default=16)
    options = parser.parse_args()
    source = Checkpoint.open("demo:smollm2-135m")
    calibration = calibrate(
        load_text(options.calibration),
        source.tokenizer,
        samples=32,
        sequence_length=512,
        seed=0,
    )
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        grid = Grid(BITS, GROUP_SIZE, source.dtype)
        pairs: dict[str, tuple[Model, Model]] = {
            "gptq:w4g64": (
                rounded(
                    source,
                    lambda w: plain_symmetric(w, BITS, GROUP_SIZE, source.dtype).dequantize(),
                    out / "rtn-symmetric",
                ),
                convert(source, Spec.parse("gptq:w4g64"), calibration, out),
            ),
            "awq:w4g64": (
                rounded(source, grid.fake, out / "rtn-asymmetric"),
                convert(source, Spec.parse("awq:w4g64"), calibration, out),
            ),
        }
        for text in options.text or ["pydoc:evaluation"]:
            section = EvaluateSection(text=text, windows=options.windows)
            plan = evaluation_plan(section, source, load_text(text))
            assert plan.windows is not None
            reference = Reference.build(source, plan.windows, out)
            print(f"\n{text}: {options.windows} windows of 512\n")
            print("| | ppl | KLD mean | top-1 | seconds | peak GiB | KLD against rounding |")
            print("| --- | --- | --- | --- | --- | --- | --- |")
            for name, models in pairs.items():
                lost = []
                for label, model in zip(("rounding", name), models, strict=True):
                    found = evaluate(model, reference, plan)
                    kld = found["kld_mean"]
                    lost.append(kld.value)
                    manifest = getattr(model, "manifest", None)
                    cost = (
                        f"{manifest.convert.seconds:.0f} | "
                        f"{manifest.convert.peak_rss_bytes / 2**30:.2f}"
                        if manifest
                        else "– | –"
                    )
                    change = f"{lost[-1] / lost[0] - 1:+.0%}" if len(lost) > 1 else "–"
                    print(
                        f"| {label} | {found['ppl'].value:.2f} | {kld.value:.4f} ± "
                        f"{kld.stderr:.4f} | {found['top1_agreement'].value:.1%} | {cost} | "
                        f"{change} |",
                        flush=True,
                    )


if __name__ == "__main__":
    spin_briefly()
    main()
