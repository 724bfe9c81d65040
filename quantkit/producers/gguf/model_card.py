"""The model card, README.md with YAML in front: what of it goes into a GGUF's metadata."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf

from quantkit.errors import first_line

_CARD = "README.md"
_READ = re.compile(
    r"(model_)?(name|author|version|organization|description|finetune|basename|size_label|url|doi|"
    r"uuid|repo_url)|model_creator|model_type|base_models?|base_model_sources|datasets?|"
    r"dataset_sources|license|license_name|license_link|tags|pipeline_tag|languages?"
)
"""The keys that ``gguf`` reads, all of which are text or lists of text."""


def read_model_card(directory: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The keys that ``gguf`` reads, as it reads them, and notes on those that are left out.

    A card is prose for people: what is wrong with it keeps no model from being converted.
    """
    try:
        card = gguf.Metadata.load_model_card(directory)
    except Exception as error:  # not UTF-8, not YAML, what YAML's constructors refuse
        return {}, (f"{_CARD}: left out of the metadata, it cannot be read: {first_line(error)}",)
    kept, notes = {}, []
    for key, value in card.items():
        if value is None or not isinstance(key, str) or not _READ.fullmatch(key):
            continue
        entries = value if isinstance(value, list) else [value]
        text = [entry for entry in entries if isinstance(entry, str)]
        if len(text) < len(entries):
            notes.append(f"{_CARD}: {key} is {value!r}, expected text: left out of the metadata")
        if text:
            kept[key] = text if isinstance(value, list) else text[0]
    return kept, tuple(notes)
