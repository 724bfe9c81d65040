"""A request's body: read once, and so strictly that no engine's reader can fail where ours did not.

JSON is UTF-8 without lone surrogates and without NaN (RFC 8259, section 8); Python's own reader
takes all of these, as well as UTF-16.
"""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from quantkit.gateway.answers import ApiError


@dataclass(frozen=True)
class Body:
    """A request's body, as it came and as JSON."""

    raw: bytes
    content: dict[str, Any]

    @classmethod
    def parse(cls, raw: bytes) -> Body:
        """Raise ApiError 400 where it is not a JSON object."""
        raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            content = from_json(raw, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON in UTF-8: {error}") from error
        if not isinstance(content, dict):
            raise ApiError(400, "the body is not a JSON object")
        return cls(raw, content)

    @property
    def model(self) -> str | None:
        """The name that it asks for, if any; raise ApiError 400 where that is no text."""
        name = self.content.get("model")
        if not isinstance(name, str | None):
            raise ApiError(400, "`model` is not a name", param="model")
        return name

    @property
    def prompts(self) -> int:
        """How many prompts it has: a list of numbers is one, in token ids."""
        prompt = self.content.get("prompt")
        if not isinstance(prompt, list) or any(isinstance(one, int) for one in prompt):
            return 1
        return max(1, len(prompt))

    @property
    def choices(self) -> int:
        """How many choices of each prompt it asks for, which llama-server also calls ``n_cmpl``;
        what is no number is the engine's to refuse."""
        asked = (self.content.get(name) for name in ("n_cmpl", "n"))
        return max(1, next((n for n in asked if isinstance(n, int)), 1))

    @property
    def answers(self) -> int:
        """Choices of all prompts together."""
        return self.choices * self.prompts

    @property
    def streamable(self) -> bool:
        """Whether llama-server can stream what is asked for whole."""
        asks = self.content.get
        return not asks("stream") and not (asks("tools") and asks("logprobs"))

    def naming(self, model: str, **changes: Any) -> bytes:
        """The same for a backend that calls the model so: untouched, where nothing changes."""
        if not changes and self.content.get("model") == model:
            return self.raw
        return json.dumps(
            {**self.content, "model": model, **changes}, ensure_ascii=False, separators=(",", ":")
        ).encode()
