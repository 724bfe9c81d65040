"""A text, or conversations, in a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from quantkit.data.text import Conversation, Text, conversation_of, of_conversations
from quantkit.errors import RecipeError


def read_text_file(path: Path) -> Text:
    """A UTF-8 file; one that ends in ``.jsonl`` holds conversations, a JSON object with
    ``messages`` a line. Raise RecipeError where it does not."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"text {path}: not UTF-8 (byte {error.start}); convert it") from error
    found = Text(path.name, "sha256:" + hashlib.sha256(data).hexdigest(), text)
    if path.suffix != ".jsonl":
        return found
    chats = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            chats.append(_conversation_in(line, f"text {path}:{number}"))
    return of_conversations(found, chats)


def _conversation_in(line: str, where: str) -> Conversation:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise RecipeError(f"{where}: not JSON: {error}") from error
    messages = content.get("messages") if isinstance(content, dict) else None
    return conversation_of(messages or (), where)
