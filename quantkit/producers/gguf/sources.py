"""Who reads a source for a GGUF: quantkit, or llama.cpp's own converter."""

from __future__ import annotations

from functools import lru_cache

from quantkit.formats.gguf.gguf_source import GGUFContent, GGUFSource
from quantkit.models.checkpoint import Checkpoint
from quantkit.producers.gguf import fallback
from quantkit.producers.gguf.checkpoint_content import CheckpointContent
from quantkit.producers.gguf.content import Content


@lru_cache(maxsize=1)
def content_of(checkpoint: Checkpoint) -> Content:
    """What GGUF files of ``checkpoint`` are made from; the last one is kept, as reading a large
    vocabulary takes seconds. Raise CheckpointError or ConversionError for what cannot be."""
    if isinstance(checkpoint, GGUFSource):
        return GGUFContent(checkpoint)
    if converter := fallback.needed(checkpoint):
        return fallback.content(checkpoint, converter)
    return CheckpointContent(checkpoint)
