"""Answers of several choices from llama-server, which tells the tokens of each choice apart.

A whole answer of its has the ``usage`` of the first choice, a stream one ``usage`` for each choice.
In OpenAI's API there is one: prompt tokens once, output tokens of all choices. Only the stream
says what that is, so whole answers are put together from one.
"""

from __future__ import annotations

import json
from typing import Any

from quantkit.gateway.metrics import Meters
from quantkit.gateway.stream import Events, usage

STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
"""What a request must say for ``assembled``."""
_NOTHING = b"data: null\n\n"
"""What llama-server says when it begins with a further prompt; clients expect an object."""


class SummedEvents(Events):
    """Events of ``choices`` choices of each of ``prompts`` prompts: the last ``usage`` is the sum,
    the others are taken out. Other engines' events, which have no ``timings``, stay as they are."""

    def __init__(self, began: float, meters: Meters, choices: int, prompts: int) -> None:
        super().__init__(began, meters)
        self._choices = choices
        self._left = choices * prompts
        self._prompt_tokens: dict[int, int] = {}
        """The tokens of each prompt."""
        self._cached_tokens: dict[int, int] = {}
        self._output_tokens = 0

    def feed(self, data: bytes, now: float) -> bytes:
        """See ``Events.feed``."""
        whole = super().feed(data, now)
        if b'"timings"' not in whole and _NOTHING not in whole:
            return whole
        return b"".join(self._summed(event + b"\n\n") for event in whole.split(b"\n\n")[:-1])

    def usage(self) -> tuple[int, int]:
        """See ``Events.usage``: the sum of what has come."""
        if not self._prompt_tokens:
            return super().usage()
        return sum(self._prompt_tokens.values()), self._output_tokens

    def _summed(self, event: bytes) -> bytes:
        if event == _NOTHING:
            return b""
        content = json.loads(event[6:]) if event.startswith(b"data: {") else {}
        first: dict[str, Any] = next(iter(content.get("choices") or ()), {})
        told = content.get("usage")
        found = usage(content) if told or first.get("finish_reason") else None
        if found is None or "timings" not in content:
            return event
        # What comes after the end of a choice, and has none itself, is of a chat: of one prompt.
        prompt = first.get("index", 0) // self._choices
        self._prompt_tokens.setdefault(prompt, found[0])
        self._cached_tokens.setdefault(prompt, content["timings"].get("cache_n", 0))
        self._output_tokens += found[1]
        self._left -= 1
        if not told:
            return event
        if not self._left:
            content["usage"] = self._sum()
        elif first:
            del content["usage"]
        else:
            return b""
        return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"

    def _sum(self) -> dict[str, Any]:
        prompt_tokens, output_tokens = self.usage()
        return {
            "completion_tokens": output_tokens,
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }


def assembled(stream: bytes) -> dict[str, Any]:
    """The whole answer that llama-server would have given instead of this stream; without
    ``timings``, which are of one choice. Its error, where the stream ends with one."""
    answer: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for event in stream.split(b"\n\n"):
        if not event.startswith(b"data: {"):
            continue
        content = json.loads(event[6:])
        if "error" in content:
            return {"error": content["error"]}
        for part in content.pop("choices"):
            _join(choices.setdefault(part["index"], {}), part)
        answer |= content
    answer.pop("timings", None)
    answer["object"] = answer["object"].removesuffix(".chunk")
    return answer | {"choices": [choices[index] for index in sorted(choices)]}


def _join(choice: dict[str, Any], part: dict[str, Any]) -> None:
    """Add what a stream tells of a choice to what it has told."""
    delta = part.pop("delta", None)
    if delta is None:
        part["text"] = choice.get("text", "") + part["text"]
    else:
        _join_message(choice.setdefault("message", {"role": "assistant", "content": ""}), delta)
    before, now = choice.get("logprobs"), part.pop("logprobs", None)
    if now:
        choice["logprobs"] = {"content": [*(before or {}).get("content", ()), *now["content"]]}
    elif delta is None:
        choice.setdefault("logprobs", None)
    choice |= part


def _join_message(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for key in ("content", "reasoning_content"):
        if text := delta.get(key):
            message[key] = message.get(key, "") + text
    for part in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if part["index"] == len(calls):
            calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = calls[part["index"]], part.get("function", {})
        call["id"] += part.get("id", "")
        for key in call["function"]:
            call["function"][key] += function.get(key, "")
