"""What `inspect` says of GGUF files: whole, in parts, odd, damaged."""

from __future__ import annotations

import ctypes
import json
import random
import re
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from llama_cpp._ggml import libggml

from quantkit.cli.main import cli
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.formats.detect import open_model
from quantkit.formats.gguf.header import read_header
from quantkit.formats.gguf.inspection import inspect
from quantkit.formats.gguf.model_file import ModelFile

TOKENS = ["<unk>", "<s>", "</s>", *"abcde"]
F32, F16, Q8_0, Q3_K, IQ2_XS = 0, 1, 8, 11, 17
BYTES = {F32: 4.0, F16: 2.0, Q8_0: 34 / 32, Q3_K: 110 / 256, IQ2_XS: 74 / 256}

Fields = dict[str, Any]
Tensors = list[tuple[str, tuple[int, ...], int, bytes]]


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def packed(value: Any) -> bytes:
    """A value of metadata as the format's description has it: type, then value."""
    if isinstance(value, list):
        kind = 8 if isinstance(value[0], str) else 5
        items = b"".join(string(v) if kind == 8 else struct.pack("<i", v) for v in value)
        return struct.pack("<IIQ", 9, kind, len(value)) + items
    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    return struct.pack("<Ii" if value < 0 else "<II", 5 if value < 0 else 4, value)


def build(fields: Fields, tensors: Tensors, version: int = 3) -> bytes:
    """A GGUF file by the format's description, sound or not."""
    alignment = fields.get("general.alignment", 32)
    out = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(fields))
    out += b"".join(string(key) + packed(value) for key, value in fields.items())
    data = b""
    for name, shape, kind, values in tensors:
        axes = tuple(reversed(shape))
        place = struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, len(data))
        out += string(name) + place
        data += values.ljust(-(-len(values) // alignment) * alignment, b"\0")
    return out.ljust(-(-len(out) // alignment) * alignment, b"\0") + data


def tensor(
    name: str, rows: int, kind: int = Q3_K, columns: int = 256, fill: bytes = b"\x11"
) -> Any:
    shape = (rows, columns) if rows > 1 else (columns,)
    return name, shape, kind, fill * int(rows * columns * BYTES[kind])


def sound() -> tuple[Fields, Tensors]:
    """A little Q3_K_M as llama.cpp would make it."""
    fields = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny",
        "general.file_type": 12,
        "llama.block_count": 2,
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * len(TOKENS),
        "tokenizer.ggml.eos_token_id": 2,
    }
    parts = ("attn_q", "attn_k", "ffn_up")
    blocks = [tensor(f"blk.{i}.{part}.weight", 4) for i in range(2) for part in parts]
    norm = tensor("output_norm.weight", 1, F32)
    return fields, [tensor("token_embd.weight", len(TOKENS)), *blocks, norm]


def replaced(**changes: Any) -> Callable[[Fields, Tensors], None]:
    """Set metadata by the end of its key; None leaves the key out."""

    def change(fields: Fields, _: Tensors) -> None:
        for key, value in changes.items():
            section = key if "__" in key else f"tokenizer__ggml__{key}"
            fields[section.replace("__", ".")] = value
            if value is None:
                del fields[section.replace("__", ".")]

    return change


def retyped(*new: Any) -> Callable[[Fields, Tensors], None]:
    """Put tensors in the places of those of the same names."""

    def change(_: Fields, tensors: Tensors) -> None:
        for one in new:
            tensors[[name for name, *_ in tensors].index(one[0])] = one

    return change


def imatrix_type(fields: Fields, tensors: Tensors) -> None:
    fields["general.file_type"] = 20
    tensors[:-1] = [tensor(name, shape[0], IQ2_XS) for name, shape, *_ in tensors[:-1]]


INFINITE = np.full(256, np.inf, np.float32).tobytes()

ODD: list[tuple[str, Callable[[Fields, Tensors], None]]] = [
    ("general.alignment is 64, usually 32", replaced(general__alignment=64)),
    ("no pre-tokenizer is named", replaced(pre=None)),
    ("no pre-tokenizer is named", replaced(pre="default")),
    ("no end-of-sequence token", replaced(eos_token_id=None)),
    ("eos_token_id is 8, there are 8 tokens", replaced(eos_token_id=8)),
    ("bos_token_id is -1, there are 8 tokens", replaced(bos_token_id=-1)),
    ("no tokenizer", replaced(model=None)),
    ("token_type has 1 entries, there are 8 tokens", replaced(token_type=[1])),
    ("token_embd.weight has 8 rows, there are 7", replaced(tokens=TOKENS[:7], token_type=[1] * 7)),
    ("no chat template, though .* 'Tiny-Instruct'", replaced(general__name="Tiny-Instruct")),
    ("no chat template, though .* called 'it'", replaced(general__finetune="it")),
    ("no general.architecture", replaced(general__architecture=None)),
    ("tensors of 2 blocks, llama.block_count says 3", replaced(llama__block_count=3)),
    ("no llama.context_length", replaced(llama__context_length=None)),
    ("no general.file_type", replaced(general__file_type=None)),
    ("called Q4_K_M by .*, and no tensor is Q4_K", replaced(general__file_type=15)),
    (
        r"^blk\.\*\.attn_q\.weight \(2 tensors\): F16 in a file called Q3_K_M, more than",
        retyped(tensor("blk.0.attn_q.weight", 4, F16), tensor("blk.1.attn_q.weight", 4, F16)),
    ),
    ("token_embd.weight: Q8_0 in a file called", retyped(tensor("token_embd.weight", 8, Q8_0))),
    (
        r"^blk\.\*\.ffn_up\.weight: Q8_0 in a .*, as 160 columns do not divide by 256",
        retyped(tensor("blk.1.ffn_up.weight", 4, Q8_0, columns=160)),
    ),
    ("takes an importance matrix, and none is named", imatrix_type),
    ("attn_k.weight: NaN or infin", retyped(tensor("blk.0.attn_k.weight", 4, fill=b"\xff"))),
    ("^output_norm.weight: NaN", retyped(("output_norm.weight", (256,), F32, INFINITE))),
    ("attn_k.weight: zero wherever", retyped(tensor("blk.0.attn_k.weight", 4, fill=b"\0"))),
    ("attn_k.weight: of no elem", retyped(("blk.0.attn_k.weight", (0, 256), Q3_K, b""))),
    ("attn_k.weight: Q4_0_4_4, which", retyped(("blk.0.attn_k.weight", (4, 256), 31, b""))),
    ("attn_k.weight: tensor type 99", retyped(("blk.0.attn_k.weight", (4, 256), 99, b""))),
    (
        "attn_k.weight: columns do not divide by 256, the block of Q3_K",
        retyped(("blk.0.attn_k.weight", (8, 128), Q3_K, b"\x11" * 440)),
    ),
    ("output_norm.weight: more than once", lambda _, t: t.append(t[-1])),
    ("32 bytes after the last tensor", lambda _, t: t.append((*t.pop()[:3], b"\1" * (1024 + 7)))),
    ("does not lie where the tensor", lambda _, t: t.insert(1, (*t.pop(1)[:3], b"\1" * 500))),
]


def test_a_sound_file_has_no_oddities(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(build(*sound()))
    facts = inspect(path)
    assert facts["oddities"] == []
    assert (facts["type"], facts["architecture"], facts["file_type"]) == (
        "model",
        "llama",
        "Q3_K_M",
    )
    assert facts["bytes"] == path.stat().st_size
    assert facts["parameters"] == 8 * 256 + 6 * 4 * 256 + 256
    stored = 8 * 110 + 6 * 4 * 110
    assert facts["tensor_types"] == {
        "F32": {"tensors": 1, "bytes": 1024},
        "Q3_K": {"tensors": 7, "bytes": stored},
    }
    assert facts["bits_per_weight"] == (stored + 1024) * 8 / facts["parameters"]
    assert facts["tensor_groups"]["blk.*.attn_q.weight"] == {"Q3_K": 2}
    assert facts["special_tokens"] == {"eos": {"id": 2, "token": "</s>"}}
    assert facts["metadata"]["llama.block_count"] == 2
    assert facts["imatrix"] is None


@pytest.mark.parametrize(("oddity", "change"), ODD, ids=[oddity for oddity, _ in ODD])
def test_each_oddity_is_told_and_nothing_else(
    tmp_path: Path, oddity: str, change: Callable[[Fields, Tensors], None]
) -> None:
    fields, tensors = sound()
    change(fields, tensors)
    path = tmp_path / "odd.gguf"
    path.write_bytes(build(fields, tensors))
    found = inspect(path)["oddities"]
    assert [bool(re.search(oddity, line)) for line in found] == [True], found


def test_old_versions_are_told_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(build(*sound(), version=2))
    assert inspect(path)["oddities"] == [
        "old.gguf: GGUF version 2, which nothing writes since 2023"
    ]
    for version, message in ((1, "llama.cpp dropped it in 2023"), (9, "expected 2 or 3")):
        path.write_bytes(build(*sound(), version=version))
        with pytest.raises(CheckpointError, match=rf"its version is {version}; {message}"):
            inspect(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"GGUF\0\0\0\3" + bytes(40), "it is big-endian"),
        (b"tjgg" + bytes(40), "a GGML file of before August 2023"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs"),
        (b"<!DOCTYPE html>\n<html>", "a web page"),
        (bytes(4096), "its download did not finish"),
        (b"PK\3\4" + bytes(40), r"it begins with b'PK\\x03\\x04'"),
    ],
)
def test_what_is_no_gguf_is_refused_with_what_it_is(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_model(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_cut_off_is_told(tmp_path: Path) -> None:
    whole, path = build(*sound()), tmp_path / "cut.gguf"
    path.write_bytes(whole)
    head = read_header(path).data_offset
    for length in (4, 8, 23, 100, head // 2, head - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"truncated GGUF, its {length} bytes end"):
            inspect(path)
    for missing in (1, 1024, len(whole) - head):
        path.write_bytes(whole[:-missing])
        found = inspect(path)["oddities"]
        assert found == [f"cut.gguf: cut off, {missing} bytes are missing; download it again"]


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def llama_cpp_reads(path: Path) -> bool:
    """Whether llama.cpp's own reader takes the file's head."""
    libggml.gguf_init_from_file.argtypes = (ctypes.c_char_p, _InitParams)
    libggml.gguf_init_from_file.restype = ctypes.c_void_p
    libggml.gguf_free.argtypes = (ctypes.c_void_p,)
    read = libggml.gguf_init_from_file(bytes(path), _InitParams(True, None))
    libggml.gguf_free(read)
    return read is not None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # names in its log
def test_what_llama_cpp_refuses_is_refused_or_odd_and_what_it_reads_is_read(tmp_path: Path) -> None:
    whole, path, chance = build(*sound()), tmp_path / "damaged.gguf", random.Random(0)
    path.write_bytes(whole)
    assert llama_cpp_reads(path)
    head = read_header(path).data_offset
    verdicts = Counter[tuple[bool, str]]()
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 4))):
            damaged[chance.randrange(head)] = chance.choice((0, 1, 9, 0x7F, 0x80, 0xFF))
        path.write_bytes(damaged)
        try:
            facts = inspect(path)
            json.dumps(facts)
            ours = "odd" if facts["oddities"] else "sound"
        except QuantkitError as error:
            ours = "refused" if len(str(error).splitlines()) == 1 else "refused in several lines"
        verdicts[llama_cpp_reads(path), ours] += 1
    assert verdicts.keys() <= {(True, "sound"), (True, "odd"), (False, "odd"), (False, "refused")}
    assert min(verdicts.values()) > 20, verdicts


def split(path: Path, parts: int = 3) -> list[Path]:
    """Write the sound file in parts, as llama-gguf-split does."""
    fields, tensors = sound()
    files = []
    for index in range(parts):
        own = dict(fields) if index == 0 else {}
        own |= {"split.no": index, "split.count": parts, "split.tensors.count": len(tensors)}
        files.append(path / f"tiny-{index + 1:05d}-of-{parts:05d}.gguf")
        files[-1].write_bytes(build(own, tensors[index::parts]))
    return files


def test_parts_are_one_model(tmp_path: Path) -> None:
    files = split(tmp_path)
    facts = inspect(files[0])
    assert facts["oddities"] == []
    assert facts["parts"] == [file.name for file in files]
    assert facts["tensors"] == 8
    assert facts["bytes"] == sum(file.stat().st_size for file in files)
    model = open_model(files[0])
    assert (model.id, model.scheme, model.weights) == ("tiny", "Q3_K_M", files[0])
    assert model.bytes == facts["bytes"]


def test_another_part_than_the_first_says_which_is_the_first(tmp_path: Path) -> None:
    files = split(tmp_path)
    for number in (2, 3):
        with pytest.raises(
            CheckpointError, match=rf"part {number} of 3; give the first, tiny-0000"
        ):
            open_model(files[number - 1])


def test_missing_parts_are_named(tmp_path: Path) -> None:
    files = split(tmp_path)
    files[1].unlink()
    assert inspect(files[0])["oddities"] == [
        "1 of its parts are missing here: tiny-00002-of-00003.gguf"
    ]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.gguf: no such file"):
        open_model(tmp_path / "nothing.gguf")


def test_parts_of_another_name_are_refused(tmp_path: Path) -> None:
    files = split(tmp_path)
    renamed = files[0].rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"names like model-00001-of-00003\.gguf: rename"):
        ModelFile.open(renamed)


def test_parts_with_too_few_tensors_are_told(tmp_path: Path) -> None:
    fields, tensors = sound()
    fields |= {"split.no": 0, "split.count": 1, "split.tensors.count": 9}
    path = tmp_path / "tiny.gguf"
    path.write_bytes(build(fields, tensors))
    (line,) = inspect(path)["oddities"]
    assert line == "its parts hold 8 tensors, split.tensors.count says 9"


def test_the_builder_writes_what_the_package_gguf_reads(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    fields, tensors = sound()
    path.write_bytes(build(fields, tensors))
    read = gguf.GGUFReader(path)
    assert {k: f.contents() for k, f in read.fields.items() if k in fields} == fields
    assert [(t.name, int(t.tensor_type), bytes(t.data)) for t in read.tensors] == [
        (name, kind, data) for name, _, kind, data in tensors
    ]


def test_the_command_prints_facts_for_people_and_for_programs(tmp_path: Path) -> None:
    fields, tensors = sound()
    fields["general.name"] = "Tiny Chat"
    path = tmp_path / "tiny.gguf"
    path.write_bytes(build(fields, tensors))
    done = CliRunner().invoke(cli, ["inspect", str(path)])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "gguf:Q3_K_M, weights without a manifest"
    assert "  types              Q3_K 3.52 kB in 7 tensors; F32 1.02 kB in 1 tensor" in lines
    odd = ["Oddities", "  no chat template, though it is called 'Tiny Chat'"]
    assert lines[-4:] == [*odd, "", "--all prints the rest: hashes, lists and settings."]
    assert "ffn_up" not in done.stdout
    full = CliRunner().invoke(cli, ["inspect", str(path), "--all"]).stdout.splitlines()
    assert full[: len(lines) - 2] == lines[:-2]
    assert "    blk.*.ffn_up.weight:" in full
    assert "    tokenizer.ggml.model: gpt2" in full
    facts = json.loads(CliRunner().invoke(cli, ["inspect", str(path), "--json"]).stdout)
    assert facts["oddities"] == ["no chat template, though it is called 'Tiny Chat'"]
    assert facts["tensor_types"]["Q3_K"] == {"tensors": 7, "bytes": 3520}


def test_the_command_prints_nothing_that_a_terminal_would_act_on(tmp_path: Path) -> None:
    fields, tensors = sound()
    fields["general.name"] = "Tiny\x1b[2J\rx"
    path = tmp_path / "tiny.gguf"
    path.write_bytes(build(fields, tensors))
    for options in ([], ["--all"]):
        shown = CliRunner().invoke(cli, ["inspect", str(path), *options]).stdout
        assert "Tiny\N{REPLACEMENT CHARACTER}[2J" in shown
        assert not {"\x1b", "\r"} & set(shown)
