"""What a conversion holds in memory: little besides one tensor, however large the model is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig

from tests.models import write_tokenizer

MIB = 1 << 20
HIDDEN, INNER, BLOCKS, VOCABULARY = 2048, 8192, 8, 1024

CONVERT = """
import sys, threading, time
from pathlib import Path
from quantkit.models.checkpoint import Checkpoint
from quantkit.producers.native_gguf import NativeGGUF
from quantkit.models.spec import Spec

def private():
    status = Path("/proc/self/status").read_text()
    return next(int(l.split()[1]) * 1024 for l in status.splitlines() if l.startswith("RssAnon"))

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, private())
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
targets = {Spec("gguf", scheme): Path(sys.argv[2], scheme) for scheme in sys.argv[3:]}
for directory in targets.values():
    directory.mkdir()
made = NativeGGUF().convert_many(Checkpoint.open(sys.argv[1]), targets, None)
assert not [error for error in made.values() if isinstance(error, Exception)], made
print(peak)
"""


def test_several_types_of_a_large_model(tmp_path: Path) -> None:
    model, out = tmp_path / "zeros", tmp_path / "out"
    total = make_zeros(model)
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, model, out, "Q8_0", "Q4_0", "Q3_K_S"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    allowed = 4 * HIDDEN * INNER + 512 * MIB
    assert total > allowed  # or holding all of it would pass
    assert int(done.stdout) <= allowed


def make_zeros(directory: Path) -> int:
    """A Llama whose weights are a hole in its file; returns their bytes."""
    directory.mkdir()
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=32,
        num_key_value_heads=32,  # rows of q and k change places: these are copied
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    write_tokenizer(directory)
    shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN], "model.norm.weight": [HIDDEN]}
    for index in range(BLOCKS):
        block = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}{norm}.weight"] = [HIDDEN]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{block}self_attn.{name}.weight"] = [HIDDEN, HIDDEN]
        shapes[f"{block}mlp.gate_proj.weight"] = [INNER, HIDDEN]
        shapes[f"{block}mlp.up_proj.weight"] = [INNER, HIDDEN]
        shapes[f"{block}mlp.down_proj.weight"] = [HIDDEN, INNER]
    entries, size = {}, 0
    for name, shape in shapes.items():
        end = size + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, end]}
        size = end
    header = json.dumps(entries).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + size)
    return size
