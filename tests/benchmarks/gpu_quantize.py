"""GPTQ and AWQ on a GPU: seconds by stage, peak memory, and how far that is from the limit.

    python -m tests.benchmarks.gpu_quantize [--shape 8b] [--device cuda] [--work DIR]

Makes a checkpoint with the shape of Llama 3.1 8B and random weights (seeded; some channels of the
norms are loud), quantizes it as a user would, hashes and manifest included, and quantizes a small
model on the CPU and on the device, which must agree.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from quantkit.data.calibration import Calibration
from quantkit.formats.shards import Entry, Shards
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import CalibrationRecord, Variant
from quantkit.producers.convert import convert
from quantkit.system import devices
from tests.models import write_tokenizer
from tests.plain_weights import plain_weights

STAGES = ("load", "forward", "hessian", "solve", "pack", "write", "other")
LOUD = 8


@dataclass(frozen=True)
class Shape:
    """Of the model and of its calibration."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    samples: int
    tokens: int
    gptq: str = "gptq:w4g128"
    awq: str = "awq:w4g128"

    @property
    def block_weights(self) -> int:
        """Weights of one block's linears."""
        width = self.hidden // self.heads * self.kv_heads
        return self.hidden * (2 * self.hidden + 2 * width + 3 * self.intermediate)

    @property
    def block_flops(self) -> float:
        """One forward pass of all calibration tokens through one block, attention included."""
        attention = 2 * self.tokens * self.hidden  # causal: half of 4 T d
        return self.samples * self.tokens * (2.0 * self.block_weights + attention)

    @property
    def hessian_flops(self) -> float:
        """XᵀX of the four inputs of one block."""
        squares = 3 * self.hidden**2 + self.intermediate**2
        return 2.0 * self.samples * self.tokens * squares


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, samples=128, tokens=2048),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, samples=128, tokens=2048),
    "tiny": Shape(256, 512, 2, 4, 2, 1024, samples=8, tokens=128),
}


def make_checkpoint(shape: Shape, directory: Path, device: torch.device) -> Checkpoint:
    """Random weights of a realistic scale, written shard by shard."""
    directory.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    write_tokenizer(directory)
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config).state_dict()
    generator = torch.Generator(device).manual_seed(0)
    entries = [Entry(name, "BF16", tuple(meta.shape)) for name, meta in names.items()]
    with Shards(directory, entries) as shards:
        for name, meta in names.items():
            if name.endswith("norm.weight"):
                tensor = torch.ones(meta.shape, device=device)
                loud = torch.randperm(tensor.numel(), generator=generator, device=device)[:LOUD]
                tensor[loud] *= 8
            else:
                tensor = torch.randn(meta.shape, generator=generator, device=device) * 0.02
            shards.write(name, tensor.bfloat16())
    return Checkpoint.open(directory)


def make_calibration(
    shape: Shape, device: torch.device, precision: torch.dtype = torch.bfloat16
) -> Calibration:
    """Random tokens: what a quantizer costs does not depend on what it reads."""
    generator = torch.Generator().manual_seed(1)
    size = (shape.samples, shape.tokens)
    ids = torch.randint(3, min(shape.vocabulary, 1000), size, generator=generator)
    record = CalibrationRecord(
        dataset="random tokens",
        revision=None,
        samples=shape.samples,
        sequence_length=shape.tokens,
        seed=1,
        sha256="",
    )
    return Calibration(ids, record, device, precision)


def rate(work: Callable[[], Any], amount: float, device: torch.device, times: int = 10) -> float:
    """``amount`` per second of ``work``, after a warm-up."""
    for _ in range(3):
        work()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return amount * times / (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_limits(device: torch.device) -> dict[str, float]:
    """Of this device: products in bfloat16 and float32 per second, and bytes copied per second."""
    n = 8192 if device.type == "cuda" else 1024
    half = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    full = half.float()
    host = torch.empty(1 << 28 if device.type == "cuda" else 1 << 22, dtype=torch.uint8)
    host = host.pin_memory() if device.type == "cuda" else host
    there = host.to(device)
    copy = torch.empty_like(there)
    return {
        "bf16 TFLOP/s": rate(lambda: half @ half, 2.0 * n**3, device) / 1e12,
        "fp32 TFLOP/s": rate(lambda: full @ full, 2.0 * n**3, device) / 1e12,
        "on the device, GB/s": rate(lambda: copy.copy_(there), 2.0 * host.numel(), device) / 1e9,
        "to the device, GB/s": rate(lambda: there.copy_(host), float(host.numel()), device) / 1e9,
        "from the device, GB/s": rate(lambda: host.copy_(there), float(host.numel()), device) / 1e9,
    }


def print_limits(shape: Shape, limits: dict[str, float], source: Checkpoint) -> None:
    """The least time that each stage could take, from its operations and bytes."""
    forward = 2 * shape.layers * shape.block_flops
    hessian = shape.layers * shape.hessian_flops
    activations = shape.samples * shape.tokens * shape.hidden * 4
    moved = 2 * shape.layers * activations
    print("\n| limit | measured |\n| --- | --- |")
    for name, value in limits.items():
        print(f"| {name} | {value:.1f} |")
    print("\n| stage | what it needs | at the measured rate |\n| --- | --- | --- |")
    bf16 = limits["bf16 TFLOP/s"] * 1e12
    print(f"| forward, twice | {forward / 1e15:.2f} PFLOP bf16 | {forward / bf16:.1f} s |")
    print(f"| hessian | {hessian / 1e15:.2f} PFLOP bf16 | {hessian / bf16:.1f} s |")
    inward = (moved + source.bytes) / (limits["to the device, GB/s"] * 1e9)
    outward = (moved / 2 + source.bytes / 4) / (limits["from the device, GB/s"] * 1e9)
    print(f"| activations, weights in | {(moved + source.bytes) / 1e9:.0f} GB | {inward:.1f} s |")
    print(f"| activations, weights out | {moved / 2e9:.0f} GB | {outward:.1f} s |", flush=True)


def print_costs(variants: list[Variant]) -> None:
    """One row a conversion."""
    print(f"\n| | seconds | GPU GiB | host GiB | {' | '.join(STAGES)} |")
    print("| --- " * (4 + len(STAGES)) + "|")
    for variant in variants:
        assert variant.manifest is not None
        cost = variant.manifest.convert
        stages = " | ".join(f"{cost.stage_seconds.get(name, 0):.1f}" for name in STAGES)
        gpu = f"{cost.peak_device_bytes / 2**30:.2f}" if cost.peak_device_bytes else "–"
        print(
            f"| {variant.id} | {cost.seconds:.1f} | {gpu} | {cost.peak_rss_bytes / 2**30:.2f} | "
            f"{stages} |",
            flush=True,
        )


def compare(shape: Shape, device: torch.device, work: Path) -> None:
    """The small model, quantized on the CPU and on the device: codes and KL divergence."""
    cpu = torch.device("cpu")
    source = make_checkpoint(shape, work / "small", cpu)
    ids = make_calibration(replace(shape, samples=4), cpu).ids + 1
    reference = _log_probabilities(source, None, ids)
    print("\n| | products | equal integers | KLD on the CPU | KLD on the device |")
    print("| --- | --- | --- | --- | --- |")
    kinds = (shape.gptq, shape.awq)
    for text, precision in itertools.product(kinds, (torch.float64, torch.bfloat16)):
        spec = Spec.parse(text)
        klds, opened = [], []
        for number, where in enumerate((cpu, device)):
            made = convert(
                source,
                spec,
                make_calibration(shape, where, precision),
                work / f"small-{number}",
                force=True,
            )
            state = dict(plain_weights(made.path))
            found = _log_probabilities(source, state, ids)
            klds.append(float((reference.exp() * (reference - found)).sum(-1).mean()))
            opened.append(Checkpoint.open(made.path))
        same = total = 0
        for name in opened[0].tensors:
            if name.endswith("qweight"):
                words = [checkpoint.read(name) for checkpoint in opened]
                for shift in range(0, 32, 4):
                    one, other = ((word >> shift) & 15 for word in words)
                    same += int((one == other).sum())
                    total += one.numel()
        products = str(precision).removeprefix("torch.")
        print(
            f"| {spec} | {products} | {same / total:.4%} | {klds[0]:.6f} | {klds[1]:.6f} |",
            flush=True,
        )


def _log_probabilities(
    source: Checkpoint, state: dict[str, torch.Tensor] | None, ids: torch.Tensor
) -> torch.Tensor:
    """Of the source, or of the source with other weights; (B, T, V) float32."""
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    if state is not None:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, help="Default: a temporary directory.")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", choices=("gptq", "awq"), help="One quantizer alone.")
    options = parser.parse_args()
    shape, device = SHAPES[options.shape], devices.choose(options.device)
    print(f"{devices.describe(device)}, torch {torch.__version__}, shape {options.shape}")
    with tempfile.TemporaryDirectory(dir=options.work) as directory:
        work = Path(directory)
        compare(SHAPES["tiny"], device, work)
        started = time.perf_counter()
        source = make_checkpoint(shape, work / "source", device)
        made = time.perf_counter() - started
        print(f"\n{source.bytes / 1e9:.1f} GB of weights made in {made:.0f} s")
        print_limits(shape, measured_limits(device), source)
        calibration = make_calibration(shape, device)
        for spec in (shape.gptq, shape.awq):
            if options.only in (None, spec.partition(":")[0]):
                repeats = [
                    convert(source, Spec.parse(spec), calibration, work, force=True)
                    for _ in range(options.repeat)
                ]
                print_costs(repeats)


if __name__ == "__main__":
    main()
