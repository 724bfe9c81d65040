"""A proof that blocks in turn compute what transformers makes of the same directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from quantkit.decoder.blocks import DecoderBlocks
from quantkit.errors import ConversionError
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.hf_config import attention, read_config
from quantkit.models.unstacked import stacks_of
from quantkit.system.files import write_json

_TOKENS = 64
_FITS = 1 << 30
"""Bytes, in float32, of a model that is compared whole; of larger ones as many blocks as make up
these bytes, the first one at least, and all that is outside of the blocks."""
_NEAR = 1e-3
"""Relative to the largest logit; another order of summation differs by a hundredth of this."""


@lru_cache(maxsize=1)
def prove(checkpoint: Checkpoint) -> None:
    """Compare logits of the streamed blocks with those of ``from_pretrained``; once for several
    variants.

    Raise ConversionError where they differ: what is quantized would be another model. Nothing is
    compared where transformers finds no weights.
    """
    blocks = DecoderBlocks(checkpoint, precision=torch.float32)
    count = _compared(blocks)
    config = checkpoint.hf_config.get_text_config()
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, _TOKENS), generator=seeded)
    with blocks.running_apart():
        found = streamed(blocks, ids, count)
    with _plain(blocks, count) as directory:
        expected = _from_pretrained(directory, checkpoint.architecture, ids, count)
    if expected is None or not expected.isfinite().all():
        return  # the block that overflows is named when it is quantized
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < _NEAR:
        raise ConversionError(
            f"{checkpoint.path}: read block by block it is not the model that transformers loads "
            f"(logits differ by {error:.2g} of the largest); this is a fault of quantkit: report it"
        )


def streamed(blocks: DecoderBlocks, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Logits for ``ids`` (samples, T) of the model's first ``count`` blocks."""
    hidden = blocks.embed(ids)
    for index in range(count):
        blocks.advance(index, blocks.load(index), hidden)
    return blocks.head()(ids, torch.cat(list(hidden)))


def _compared(blocks: DecoderBlocks) -> int:
    """How many blocks."""
    tensors = blocks.checkpoint.tensors
    room = _FITS - 4 * sum(tensors[name].numel for name in blocks.tensors_outside())
    one = 4 * sum(tensors[name].numel for name in blocks.stored(0).values())
    return max(1, min(len(blocks), room // one))


@contextmanager
def _plain(blocks: DecoderBlocks, count: int) -> Iterator[Path]:
    """The checkpoint's directory; where it is quantized one with what is compared, decoded: the
    kernels that transformers would need are not for every machine."""
    checkpoint = blocks.source
    if not checkpoint.quantized:
        yield checkpoint.path
        return
    inside = (name for index in range(count) for name in blocks.stored(index).values())
    wanted = {*blocks.tensors_outside(), *inside} & blocks.checkpoint.tensors.keys()
    names = stacks_of(blocks.checkpoint, wanted)
    with TemporaryDirectory(prefix="quantkit-") as directory:
        path = Path(directory)
        save_file({name: checkpoint.read(name) for name in names}, path / "model.safetensors")
        write_json(path / "config.json", checkpoint.config)
        yield path


def _from_pretrained(
    path: Path, architecture: str, ids: torch.Tensor, count: int
) -> torch.Tensor | None:
    import transformers

    config = read_config(path)
    text = config.get_text_config(decoder=True)
    if count < text.num_hidden_layers:
        _cut(text, count)
    # A model that also sees is compared whole: asked for text only.
    named = getattr(transformers, architecture, None)
    class_: Any = named or transformers.AutoModelForCausalLM
    with _quiet():
        try:
            model: Any = class_.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                attn_implementation=attention(text),
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
            )
        except OSError:
            return None
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits


def _cut(config: Any, count: int) -> None:
    """Let it be of a model with its first blocks alone."""
    whole = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == whole:
            setattr(config, name, value[:count])
    config.num_hidden_layers = count


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report on blocks that are left out, and its progress bar."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
