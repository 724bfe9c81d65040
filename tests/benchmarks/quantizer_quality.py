"""What quantizers lose, on texts of every kind, beside rounding to nearest and their peers.

    python -m tests.benchmarks.quantizer_quality --out quality.jsonl --model demo=demo:smollm2-135m
    python -m tests.benchmarks.quantizer_quality --table quality.jsonl

Every method gets the same token ids; every variant is scored alike: its weights unpacked into
transformers' model, KL divergence from the source in plain torch, on texts that it was calibrated
on and on others, on windows that none was. What stands in the file already is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tests.benchmarks.quality import records, table, texts
from tests.benchmarks.quality.methods import METHODS, Absent, Job
from tests.benchmarks.quality.oracle import Oracle

if TYPE_CHECKING:
    import torch

_MIX = "mix"


def main() -> None:
    """Measure, or print the tables."""
    options = _arguments()
    if options.table:
        print("\n".join(table.tables(records.read(options.table))))
        return
    failed = [line for model in options.model for line in _measure(model, options)]
    print(*failed, sep="\n", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _measure(model: str, options: argparse.Namespace) -> Iterator[str]:
    """Every method on one model; what failed, a line each."""
    from transformers import AutoTokenizer

    name, _, place = model.partition("=")
    source = _directory(place)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    device, ids = _device(options.device), _calibration(options, tokenizer)
    windows = {
        kind: texts.scored(options.data, tokenizer, kind, options.windows, options.context)
        for kind in options.texts
    }
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in windows.values()))
    scored = f"{options.windows} x {options.context} of each text ({digest.hexdigest()[:8]})"
    calibration = f"{options.samples} x {options.length} of {'+'.join(options.calibration)}"
    with TemporaryDirectory(dir=options.work, prefix="oracle-") as cache:
        oracle: Oracle | None = None
        done = {record.key for record in records.read([options.out])}
        for scheme, chosen in itertools.product(options.schemes, options.methods):
            method = METHODS[chosen]
            with TemporaryDirectory(dir=options.work, prefix=f"{chosen}-") as work:
                job = Job(
                    source, scheme, ids, calibration, str(device), options.iters, Path(work),
                    options.commit, options.llm_compressor,
                )  # fmt: skip
                try:
                    record = records.Record(
                        model=name,
                        method=chosen,
                        scheme=method.scheme(scheme),
                        maker=method.maker(job),
                        calibration=calibration if method.calibrates else "",
                        iters=options.iters if method.learns else None,
                        scored=scored,
                        texts={},
                        bits_per_weight=0,
                        bits_per_weight_quantized=None,
                        seconds=None,
                        device=_named(device),
                    )
                    if record.key in done:
                        continue
                    print(f"{name} {record.scheme}: {method.label}", file=sys.stderr, flush=True)
                    made = method.make(job)
                    oracle = oracle or Oracle(source, windows, device, Path(cache))
                    measured = {
                        "texts": oracle.score(made.state, made.inputs),
                        "bits_per_weight": made.bits_per_weight,
                        "bits_per_weight_quantized": made.bits_per_weight_quantized,
                        "seconds": made.seconds,
                    }
                except Absent as reason:
                    print(reason, file=sys.stderr, flush=True)
                    continue
                except Exception:
                    traceback.print_exc()
                    yield f"{name} {scheme}: {method.label} failed"
                    continue
            done.add(record.key)
            records.append(options.out, record.model_copy(update=measured))


def _calibration(options: argparse.Namespace, tokenizer: Any) -> torch.Tensor:
    """The token ids that every method is given: (samples, length) int64."""
    if options.calibration != [_MIX]:
        return texts.calibration(
            options.data, tokenizer, options.calibration, options.samples, options.length,
            options.seed,
        )  # fmt: skip
    from quantkit.data.calibration import calibrate
    from quantkit.data.mix import load_calibration

    size = {"samples": options.samples, "sequence_length": options.length}
    return calibrate(load_calibration(_MIX), tokenizer, seed=options.seed, **size).ids


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", action="append", metavar="NAME=PATH", help="A checkpoint. May be repeated.")
    add("--out", type=Path, help="JSON lines, which are added to.")
    add("--table", type=Path, nargs="+", metavar="FILE", help="Print the tables of such files.")
    add("--methods", type=_listed(METHODS), default=list(METHODS), help=", ".join(METHODS))
    add("--schemes", type=_listed(), default=["w4g64", "w4g128"], help="w4g64,w4g128")
    add("--texts", type=_listed(texts.FILES), default=list(texts.FILES), help="To score.")
    add("--windows", type=int, default=8, help="Of each text.")
    add("--context", type=int, default=512, help="Tokens of a scored window.")
    add("--calibration", type=_listed([*texts.FILES, _MIX]), help="Kinds, in equal parts, or mix: "
        "quantkit's default.", default=["c4", "code", "technical", "mixed"])  # fmt: skip
    add("--samples", type=int, default=32, help="Calibration windows, in all.")
    add("--length", type=int, default=512, help="Tokens of a calibration window.")
    add("--seed", type=int, default=0, help="Which calibration windows.")
    add("--iters", type=int, default=50, help="Steps of learning a block, where there are any.")
    add("--device", default="auto", help="auto, cpu or cuda.")
    add("--data", type=Path, default=Path("../shared/data"), help="Where the texts are.")
    add("--work", type=Path, help="For what is thrown away. Default: the temporary directory.")
    add("--commit", default=_commit(), help="Of quantkit, as the table names it.")
    add("--llm-compressor", type=Path, metavar="PYTHON", help="Of an environment that has it.")
    options = parser.parse_args()
    if not options.table and not (options.model and options.out):
        parser.error("--model and --out are needed, or --table")
    if _MIX in options.calibration[1:] or options.calibration[:-1] == [_MIX]:
        parser.error("--calibration: mix stands alone")
    return options


def _listed(known: Collection[str] = ()) -> Callable[[str], list[str]]:
    """A list with commas, of what is known where anything is."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if known and name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is not among {', '.join(known)}")
        return names

    return parse


def _directory(place: str) -> Path:
    if not place.startswith("demo:"):
        return Path(place)
    from quantkit.models import demo

    return demo.directory(place)


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _named(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _commit() -> str:
    """Of the working tree; ``+`` where it is changed."""
    git = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.check_output(git, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "of an unknown commit"


if __name__ == "__main__":
    main()
