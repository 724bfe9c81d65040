"""llama.cpp's converter, run for several models in one process: importing it takes seconds.

Arguments, each as JSON: the jobs (checkpoint, scheme, file to write), options of the converter,
and whether it is to write the tokenizer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any


def run(jobs: list[list[str]], options: list[str], *, tokenizer: bool) -> None:
    """Raise what the converter raises, or SystemExit."""
    converter: Any = import_module("convert_hf_to_gguf")
    repair_gpt2()
    repair_gptneox()
    repair_stablelm()
    leave_out_the_drafts()
    if not tokenizer:
        leave_out_the_tokenizer(converter)
    for model, scheme, out in jobs:
        sys.argv = ["convert", model, "--outtype", scheme.lower(), "--outfile", out, *options]
        converter.main()


def leave_out_the_tokenizer(converter: Any) -> None:
    """For models whose tokenizer it does not know: it goes by hashes of real ones."""
    model_class = converter.get_model_class

    def without(*arguments: Any, **options: Any) -> Any:
        found = model_class(*arguments, **options)
        found.set_vocab = lambda model: None
        return found

    converter.get_model_class = without


def repair_gpt2() -> None:
    """It has no name for the causal masks that OpenAI's checkpoints hold, and stops."""
    gpt2: Any = import_module("conversion.gpt2").GPT2Model
    modify = gpt2.modify_tensors

    def modify_tensors(model: Any, tensor: Any, name: str, block: int | None) -> Iterator[Any]:
        if not name.endswith(".attn.bias"):
            yield from modify(model, tensor, name, block)

    gpt2.modify_tensors = modify_tensors


def leave_out_the_drafts() -> None:
    """Of Qwen3.5's: it stops where a checkpoint has none."""
    base: Any = import_module("conversion.base").ModelBase
    base.no_mtp = True


def repair_gptneox() -> None:
    """It looks for ``rotary_pct`` where transformers 4 had it, and stops."""
    gptneox: Any = import_module("conversion.gptneox").GPTNeoXModel
    set_parameters = gptneox.set_gguf_parameters

    def set_gguf_parameters(model: Any) -> None:
        model.hparams["rotary_pct"] = model.rope_parameters["partial_rotary_factor"]
        set_parameters(model)

    gptneox.set_gguf_parameters = set_gguf_parameters


def repair_stablelm() -> None:
    """It returns the stacked norms of the heads from a generator, which loses them, and stops."""
    stablelm: Any = import_module("conversion.stablelm").StableLMModel
    modify = stablelm.modify_tensors

    def modify_tensors(model: Any, tensor: Any, name: str, block: int | None) -> Iterator[Any]:
        stacked = yield from modify(model, tensor, name, block)
        yield from stacked or ()

    stablelm.modify_tensors = modify_tensors


if __name__ == "__main__":
    jobs, options, tokenizer = map(json.loads, sys.argv[1:])
    run(jobs, options, tokenizer=tokenizer)
