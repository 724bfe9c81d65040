"""A text, and the conversations that one may be made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantkit.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_MIN_PARAGRAPH = 64
"""Characters below which a paragraph says nothing about where it came from (headings, 'x = 1')."""

Conversation = tuple[dict[str, str], ...]
"""Messages, each with ``role`` and ``content``."""


class MissingText(RecipeError):
    """A text whose source is not installed."""


@dataclass(frozen=True)
class Text:
    """A text and where it came from; ``revision`` is what pins it: a version or a hash."""

    dataset: str
    revision: str | None
    text: str
    conversations: tuple[Conversation, ...] = ()
    """The conversations that the text is made of, if any; ``text`` is then their messages."""


def said(conversation: Conversation) -> str:
    """What a conversation says, without who says it."""
    return "\n\n".join(message["content"] for message in conversation)


def of_conversations(text: Text, conversations: Iterable[Conversation]) -> Text:
    """``text`` as one that is made of these."""
    chats = tuple(conversations)
    return replace(text, text="\n\n".join(map(said, chats)), conversations=chats)


def conversation_of(messages: Iterable[Mapping[str, Any]], where: str) -> Conversation:
    """Roles and contents of the messages; raise RecipeError where one is not a text."""
    try:
        found = tuple({key: message[key] for key in ("role", "content")} for message in messages)
        if not found or not all(isinstance(text, str) for one in found for text in one.values()):
            raise TypeError
    except (KeyError, TypeError) as error:
        raise RecipeError(
            f'{where}: expected {{"messages": [{{"role": "user", "content": "…"}}, …]}}'
        ) from error
    return found


def paragraphs(text: str) -> set[str]:
    """The lines long enough to be recognized again, without the space around them."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= _MIN_PARAGRAPH}
