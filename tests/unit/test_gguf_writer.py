"""The one pass that writes GGUF files: several at once, failures, and files beyond 4 GiB."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import ConversionError
from quantkit.formats.gguf import ggml
from quantkit.formats.gguf.header import read_header
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant, verify
from quantkit.producers.convert import convert_many
from quantkit.producers.gguf import quantizer, writer
from quantkit.producers.gguf.quantizer import Job, Quantizer
from quantkit.producers.gguf.special_tokens import SpecialTokens
from quantkit.producers.native_gguf import NativeGGUF
from quantkit.producers.proof.tokens import Comparison
from quantkit.system.streaming_digest import StreamingDigest
from tests.models import make_checkpoint

SCHEMES = ("F16", "Q8_0", "Q4_K_M", "Q4_K_S", "IQ4_NL")


def targets(directory: Path, schemes: Sequence[str]) -> dict[Spec, Path]:
    found = {Spec("gguf", scheme): directory / scheme for scheme in schemes}
    for path in found.values():
        path.mkdir(parents=True)
    return found


def with_tensor(model: Path, out: Path, name: str, value: torch.Tensor) -> Checkpoint:
    """The model with another tensor of this name."""
    out.mkdir()
    for file in model.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    state = load_file(model / "model.safetensors")  # mapped: not the one that is replaced
    assert state[name].shape == value.shape
    save_file({**state, name: value.to(state[name].dtype)}, out / "model.safetensors")
    return Checkpoint.open(out)


def test_one_pass_gives_what_single_ones_do(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "_VALUES", (700, 700))  # two rows at a time
    checkpoint = Checkpoint.open(tiny_qwen2)
    together = targets(tmp_path / "together", SCHEMES)
    reads: list[str] = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda c, name: (reads.append(name), read(c, name))[1])
    NativeGGUF().convert_many(checkpoint, together, None)
    assert sorted(reads) == sorted(checkpoint.tensors)
    monkeypatch.setattr(quantizer, "_VALUES", (1 << 20, 1 << 20))
    for spec, out in targets(tmp_path / "alone", SCHEMES).items():
        NativeGGUF().convert(checkpoint, spec, None, out)
        (one,), (other,) = out.iterdir(), together[spec].iterdir()
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()


def test_digests_are_those_of_the_files(tiny_qwen2: Path, tmp_path: Path) -> None:
    specs = [Spec("gguf", scheme).having({"split_max_size": "300K"}) for scheme in SCHEMES]
    for variant in convert_many(Checkpoint.open(tiny_qwen2), specs, None, tmp_path).values():
        assert isinstance(variant, Variant)
        assert verify(variant) == []
        assert len(list(variant.path.glob("*-of-*.gguf"))) > 1


def test_a_digest_follows_a_file_that_grows(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3_000_000)
    path = tmp_path / "file"
    path.write_bytes(bytes(len(data)))
    digest = StreamingDigest(path)
    with path.open("r+b") as file:
        for end in (1, 70_000, 70_000, 2_500_000):
            file.write(data[file.tell() : end])
            file.flush()
            digest.advance(end)
        file.write(data[file.tell() :])
    assert digest.hexdigest(len(data)) == hashlib.sha256(data).hexdigest()
    longer = StreamingDigest(path)
    longer.advance(2_000_000)
    with pytest.raises(OSError, match="ends after 3000000 bytes"):
        longer.hexdigest(4_000_000)
    StreamingDigest(path).abandon()
    assert not [t for t in threading.enumerate() if t.name == "growing-digest"]


def test_one_that_fails_leaves_the_others(tiny_llama: Path, tmp_path: Path) -> None:
    large = torch.full((512, 256), 1e5)
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoint = with_tensor(tiny_llama, tmp_path / "large", name, large)
    specs = [Spec("gguf", scheme) for scheme in ("F16", "Q8_0", "BF16")]
    specs += [Spec("gguf", "Q4_0").having({"output_type": "Q9"})]
    made = convert_many(checkpoint, specs, None, tmp_path / "out")
    failed = {spec.scheme: made[spec] for spec in (specs[0], specs[3])}
    assert "holds 9.98e+04, more than F16 can" in str(failed["F16"])
    assert "'Q9' is not a type of tensors" in str(failed["Q4_0"])
    for spec in specs[1:3]:
        variant = made[spec]
        assert isinstance(variant, Variant)
        assert verify(variant) == []
        assert variant.manifest is not None
        assert variant.manifest.convert.variants == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gguf-BF16", "gguf-Q8_0"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(
    tiny_llama: Path, tmp_path: Path, value: float
) -> None:
    bad = torch.zeros(512, 256)
    bad[300, 17] = value
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoint = with_tensor(tiny_llama, tmp_path / "bad", name, bad)
    made = NativeGGUF().convert_many(checkpoint, targets(tmp_path, ("BF16", "Q4_0")), None)
    for error in made.values():
        assert isinstance(error, ConversionError)
        assert "blk.1.ffn_up.weight holds NaN or infinity" in str(error)
    assert not list(tmp_path.glob("*/*.gguf"))


def test_a_scale_beyond_float16_is_refused(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", dtype=torch.float32)
    huge = torch.full((512, 256), 1e9)
    name = "model.layers.0.mlp.gate_proj.weight"
    checkpoint = with_tensor(model, tmp_path / "huge", name, huge)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match=r"ffn_gate.weight holds 1e\+09, more than Q8_0 can"):
        NativeGGUF().convert(checkpoint, Spec("gguf", "Q8_0"), None, tmp_path / "out")


def test_an_interrupt_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Quantizer, "quantize", interrupted)
    specs = [Spec("gguf", "Q8_0"), Spec("gguf", "F16")]
    with pytest.raises(KeyboardInterrupt):
        convert_many(Checkpoint.open(tiny_llama), specs, None, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("gguf-")]


def test_offsets_beyond_4_gib(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The embedding is a hole in the shard and in the files, which disks store as next to nothing.
    rows, columns = 4_300_000, 256
    directory = tmp_path / "large"
    directory.mkdir()
    for file in tiny_llama.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    monkeypatch.setattr("quantkit.producers.gguf.checkpoint_content.read_tokenizer", _few_tokens)
    monkeypatch.setattr("quantkit.producers.proof.tokens.of_content", lambda *_: Comparison(0))
    state = load_file(tiny_llama / "model.safetensors")
    _save_with_hole(directory / "model.safetensors", state, (rows, columns))
    quantize = Quantizer.quantize

    def all_but_the_hole(self: Quantizer, name: str, w: torch.Tensor, jobs: Sequence[Job]) -> None:
        if name != "token_embd.weight":
            quantize(self, name, w, jobs)

    monkeypatch.setattr(Quantizer, "quantize", all_but_the_hole)
    checkpoint = Checkpoint.open(directory)
    made = targets(tmp_path / "out", ("F32", "BF16"))
    NativeGGUF().convert_many(checkpoint, made, None)
    for spec, out in made.items():
        (file,) = out.iterdir()
        assert file.stat().st_size == NativeGGUF().plan(checkpoint, spec).bytes
        assert file.stat().st_blocks * 512 < 64 << 20
        header = read_header(file)
        (last,) = (t for t in header.tensors if t.name == "blk.1.ffn_down.weight")
        if spec.scheme == "F32":
            assert last.offset > 1 << 32
        dtype = {"F32": np.float32, "BF16": np.uint16}[spec.scheme]
        with file.open("rb") as stored:
            stored.seek(header.data_offset + last.offset)
            found = np.frombuffer(stored.read(256 * 512 * np.dtype(dtype).itemsize), dtype)
        weights = state["model.layers.1.mlp.down_proj.weight"]
        expected = weights.float() if spec.scheme == "F32" else weights.view(torch.uint16)
        assert np.array_equal(found, expected.numpy().ravel())


class _few_tokens:  # noqa: N801  stands for a function
    """A vocabulary without tokens."""

    tokens = ()
    special = SpecialTokens()

    def __init__(self, *_: object) -> None:
        pass

    def write(self, _: Any) -> None:
        pass


def _save_with_hole(path: Path, state: dict[str, torch.Tensor], shape: tuple[int, int]) -> None:
    """The tensors in safetensors, the embedding first and not written."""
    name = "model.embed_tokens.weight"
    size = shape[0] * shape[1] * 2
    entries: dict[str, Any] = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}
    del state[name]
    for key, tensor in state.items():
        offsets = [size, size + tensor.nbytes]
        entries[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        size += tensor.nbytes
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(shape[0] * shape[1] * 2, 1)
        for tensor in state.values():
            file.write(tensor.view(torch.uint8).numpy().tobytes())


class _Content:
    """Counts how many bytes of tensors are alive."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        self.alive: list[int] = []
        self.tensors = [_Tensor(str(i), shape, self) for i, shape in enumerate(shapes)]

    def read(self, tensor: _Tensor) -> torch.Tensor:
        return tensor.read()


class _Tensor:
    def __init__(self, name: str, shape: tuple[int, int], content: _Content) -> None:
        self.name, self.shape, self._content = name, shape, content

    def read(self) -> torch.Tensor:
        self._content.alive.append(self.shape[0] * self.shape[1] * 4)
        return torch.zeros(self.shape)


def test_two_tensors_are_held_only_where_they_take_no_more_than_the_largest() -> None:
    content = _Content([(10, 10), (10, 10), (100, 10), (60, 10), (40, 10), (50, 10)])
    seen = []
    for tensor, weights in writer._read_ahead(content, content.tensors, ""):  # type: ignore[arg-type]
        ahead = tensor is not content.tensors[-1]
        following = content.tensors[int(tensor.name) + 1] if ahead else tensor
        fits = (weights.numel() + following.shape[0] * following.shape[1]) * 4 <= 4000
        while ahead and fits and len(content.alive) < int(tensor.name) + 2:
            pass  # it is being read
        seen.append(len(content.alive))
    assert seen == [2, 2, 3, 5, 6, 6]


def test_float16_is_widened_to_the_last_value_of_a_row() -> None:
    """Rows that the processor's vectors do not divide."""
    values = torch.arange(1, 8, dtype=torch.float16) / 3
    for count in range(1, 8):
        found = torch.zeros(7)
        ggml.TO_FLOAT32["torch.float16"](values.data_ptr(), found.data_ptr(), count)
        assert torch.equal(found[:count], values[:count].float())
