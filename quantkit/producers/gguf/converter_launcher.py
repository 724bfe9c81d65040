"""Runs llama.cpp's converter so that it executes nothing of a checkpoint's.

A script for a process of its own, which imports nothing of quantkit. Arguments: the converter's
directory, ``whole`` or ``head``, the name of the pre-tokenizer or nothing, and what the converter
is to be given. ``head`` leaves a hole in the file where the tensors' data would be: no weight is
read for it. The last line of its output is the reason where it fails.
"""

from __future__ import annotations

import runpy
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn


def main() -> None:
    """Does not return where the converter fails: it exits, after the reason was printed."""
    directory, extent, pretokenizer, *arguments = sys.argv[1:]
    script = Path(directory) / "convert_hf_to_gguf.py"
    try:
        refuse_code()
        if extent == "head":
            leave_out_the_data()
        if pretokenizer:
            name_pretokenizer(pretokenizer)
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")
    except Exception as error:
        traceback.print_exc()
        sys.exit(reason(error, script.parent))


def reason(error: Exception, converter: Path) -> str:
    """One line: what the error says, or where it says little (a failed ``assert``, a missing key),
    the line of the converter that it comes from."""
    said = (str(error).strip().splitlines() or [""])[0]
    if " " in said:
        return said
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(converter)]
    (frame,) = (own or list(frames))[-1:]
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    code = (frame.line or "").partition("  #")[0]
    return f"{what} at `{code}` ({Path(frame.filename).name}, line {frame.lineno})"


def name_pretokenizer(name: str) -> None:
    """The converter knows tokenizers by hashes of real vocabularies, and stops at any other: give
    it the answer there."""
    text_model: Any = import_module("conversion.base").TextModel
    known = text_model.get_vocab_base_pre

    def get_vocab_base_pre(model: Any, tokenizer: Any) -> Any:
        try:
            return known(model, tokenizer)
        except NotImplementedError:
            return name

    text_model.get_vocab_base_pre = get_vocab_base_pre


def refuse_code() -> None:
    """The converter loads some tokenizers with ``trust_remote_code=True``: take that from it.

    Whatever else in transformers would fetch or import a checkpoint's modules is refused too, and
    so is pickle.
    """
    import torch
    import transformers
    from transformers import dynamic_module_utils

    for name in ("AutoConfig", "AutoTokenizer"):
        auto = getattr(transformers, name)
        auto.from_pretrained = staticmethod(_distrusting(auto.from_pretrained))
    dynamic_module_utils.get_cached_module_file = _refuse
    dynamic_module_utils.get_class_in_module = _refuse
    torch.load = _refuse


def leave_out_the_data() -> None:
    """Write a file's head, and make it as long as it would be."""
    from gguf import GGUFWriter

    def write_head(writer: Any, **_: Any) -> None:
        writer.write_ti_data_to_file()
        for file, tensors in zip(writer.fout, writer.tensors, strict=True):
            writer.write_padding(file, file.tell())
            size = sum(writer.ggml_pad(t.nbytes, writer.data_alignment) for t in tensors.values())
            file.truncate(file.tell() + size)

    GGUFWriter.write_tensors_to_file = write_head


def _distrusting(load: Any) -> Any:
    def from_pretrained(*arguments: Any, **options: Any) -> Any:
        return load(*arguments, **(options | {"trust_remote_code": False}))

    return from_pretrained


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("the checkpoint asks for code of its own to be run, or for a pickle")


if __name__ == "__main__":
    main()
