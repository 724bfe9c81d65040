"""Making GGUF files beside llama.cpp's own converter and quantizer: a ratio of seconds, and memory.

    python -m tests.benchmarks.gguf_conversion [--shape 1.5b] [--repetitions 3] [--work DIR]

The checkpoint has the shape of Qwen2 1.5B, its tokenizer, and random weights in bf16. Both sides
are run as a user would, as commands, in turn, with every file in the page cache (by default in
/dev/shm); quantkit's seconds include hashing the source and the result. What they write is compared
byte for byte. Memory is private: the peak of what belongs to no file (RssAnon), over all processes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import psutil
import torch
from transformers import Qwen2Config

from quantkit.formats.gguf.header import read_header
from quantkit.formats.shards import Entry, Shards
from quantkit.system.files import sha256_files
from tests import fetch_llama_cpp
from tests.gguf_tokenizers import QWEN_2, write_byte_level

MIB = 1 << 20
SHAPES = {
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2},
    "small": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4,
              "num_attention_heads": 16, "num_key_value_heads": 2},
}  # fmt: skip
VOCABULARY = 151936
FIVE = ("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
TARGETS = {("F16",): 2.0, ("Q8_0",): 2.0, ("Q4_K_M",): 1.3, FIVE: 2.0}
"""How many times faster than llama.cpp's tools quantkit is to be."""
SPARE_BYTES = 512 * MIB
"""What it may hold besides the largest tensor in float32."""

PACKAGES = Path(llama_cpp.__file__).parents[1]


@dataclass(frozen=True)
class Cost:
    """Of one or more commands: wall seconds, summed; peak private bytes, the largest."""

    seconds: float
    private_bytes: int


def make_model(shape: str, directory: Path) -> int:
    """Write the checkpoint; returns the bytes of its largest tensor in float32."""
    config = Qwen2Config(
        **SHAPES[shape],
        vocab_size=VOCABULARY,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151645,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )
    directory.mkdir()
    config.save_pretrained(directory)
    write_byte_level(vocabulary(), directory, QWEN_2)
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)}
    for index in range(config.num_hidden_layers):
        block = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}{norm}.weight"] = (hidden,)
        for name, sizes in linears.items():
            shapes[f"{block}{name}.weight"] = sizes
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                shapes[f"{block}{name}.bias"] = sizes[:1]
    with Shards(directory, [Entry(name, "BF16", shape) for name, shape in shapes.items()]) as out:
        for name, shape in shapes.items():
            out.write(name, random(*shape) + name.endswith("norm.weight"))
    return 4 * VOCABULARY * hidden


def vocabulary() -> Path:
    """Qwen 2's, among llama.cpp's sources."""
    return fetch_llama_cpp.fetch() / "models" / "ggml-vocab-qwen2.gguf"


def run(command: Sequence[object]) -> Cost:
    """Run a command to its end; raise CalledProcessError where it fails."""
    sources = fetch_llama_cpp.fetch()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "LD_LIBRARY_PATH": str(PACKAGES / "lib"),
        "PYTHONPATH": os.pathsep.join(map(str, (Path.cwd(), sources, sources / "gguf-py"))),
    }
    started = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, private_bytes(process.pid))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.monotonic() - started
    watcher.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[:3], stderr=errors[-2000:])
    return Cost(seconds, peak)


def private_bytes(pid: int) -> int:
    """Resident bytes of a process and its children that belong to no file."""
    total = 0
    try:
        tree = psutil.Process(pid)
        for process in (tree, *tree.children(recursive=True)):
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = [line for line in status.splitlines() if line.startswith("RssAnon")]
            total += sum(int(line.split()[1]) * 1024 for line in found)
    except (psutil.Error, OSError):
        pass  # it just ended
    return total


def ours(model: Path, schemes: Sequence[str], out: Path) -> tuple[Cost, dict[str, Path]]:
    """One command for all types."""
    wanted = [word for scheme in schemes for word in ("--to", f"gguf:{scheme}")]
    cost = run([sys.executable, "-m", "quantkit", "convert", model, *wanted, "--out", out])
    return cost, {scheme: next((out / f"gguf-{scheme}").glob("*.gguf")) for scheme in schemes}


def theirs(model: Path, schemes: Sequence[str], out: Path) -> tuple[Cost, dict[str, Path]]:
    """The converter, and for each quantized type the quantizer, on all cores."""
    converter = [sys.executable, fetch_llama_cpp.fetch() / "convert_hf_to_gguf.py", model]
    base = "f16" if list(schemes) == ["F16"] else "bf16"
    unquantized = out / f"{base}.gguf"
    out.mkdir()
    costs = [run([*converter, "--outtype", base, "--outfile", unquantized])]
    if base == "f16":
        return costs[0], {"F16": unquantized}
    files = {scheme: out / f"{scheme}.gguf" for scheme in schemes}
    for scheme, file in files.items():
        tool = PACKAGES / "bin" / "llama-quantize"
        costs.append(run([tool, unquantized, file, scheme, os.cpu_count()]))
    return Cost(
        sum(cost.seconds for cost in costs), max(cost.private_bytes for cost in costs)
    ), files


def assert_same(one: Path, other: Path) -> None:
    """Same tensors, same bytes; keys in any order."""
    a, b = read_header(one), read_header(other)
    assert a.tensors == b.tensors, f"{one} and {other}: other tensors"
    names = a.metadata.keys() | b.metadata.keys()
    # llama.cpp's converter calls the model after its directory, as we do.
    assert not [k for k in names if a.metadata.get(k) != b.metadata.get(k)]
    with one.open("rb") as first, other.open("rb") as second:
        first.seek(a.data_offset)
        second.seek(b.data_offset)
        while data := first.read(16 * MIB):
            assert data == second.read(len(data)), f"{one} and {other}: other bytes"
        assert not second.read(1), f"{other}: is longer"


def main() -> None:
    """Print a line for each set of types, and whether it meets its target."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--types", action="append", help="Such as Q8_0,Q4_0; all by default.")
    parser.add_argument("--work", default="/dev/shm")
    options = parser.parse_args()
    sets = [tuple(types.split(",")) for types in options.types or []] or list(TARGETS)
    with tempfile.TemporaryDirectory(prefix="quantkit-", dir=options.work) as work:
        model = Path(work) / "Qwen2-Random"
        limit = make_model(options.shape, model) + SPARE_BYTES
        sha256_files(model.iterdir())  # into the page cache
        print("| types | ours, s | theirs, s | times faster | ours, MiB | theirs, MiB |")
        print("| --- | --- | --- | --- | --- | --- |")
        for schemes in sets:
            measure(model, schemes, options.repetitions, Path(work), limit)


def measure(model: Path, schemes: Sequence[str], repetitions: int, work: Path, limit: int) -> None:
    """Both sides in turn; prints medians, and the ratio's range."""
    pairs = []
    for repetition in range(repetitions):
        sides = {"ours": ours, "theirs": theirs}
        results = {}
        for side in sorted(sides, reverse=bool(repetition % 2)):
            results[side] = sides[side](model, schemes, work / side)
        if repetition == 0:
            for scheme in schemes:
                assert_same(results["ours"][1][scheme], results["theirs"][1][scheme])
        for side in sides:
            shutil.rmtree(work / side)
        pairs.append((results["ours"][0], results["theirs"][0]))
    ratios = [other.seconds / own.seconds for own, other in pairs]
    seconds = [statistics.median(pair[i].seconds for pair in pairs) for i in (0, 1)]
    memory = [max(pair[i].private_bytes for pair in pairs) // MIB for i in (0, 1)]
    print(
        f"| {' '.join(schemes)} | {seconds[0]:.1f} | {seconds[1]:.1f} | "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
        f"{memory[0]} | {memory[1]} |",
        flush=True,
    )
    target = TARGETS.get(tuple(schemes))
    if target and statistics.median(ratios) < target:
        print(f"below the target of {target}", file=sys.stderr)
    if memory[0] * MIB > limit:
        print(f"more memory than {limit // MIB} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
