"""From the ``model`` of a request to the backends that may compute it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import did_you_mean
from quantkit.gateway.answers import ApiError
from quantkit.gateway.backends import Serving
from quantkit.gateway.body import Body
from quantkit.gateway.config import GatewayConfig, Rule

_CHARACTERS_A_TOKEN = 4


class Router:
    """Knows the models, their other names and their rules."""

    def __init__(self, config: GatewayConfig, backends: Mapping[str, Serving]) -> None:
        self._rules = config.models
        self._aliases = config.aliases
        self._backends = backends
        self._running = dict.fromkeys(config.models, 0)

    @property
    def names(self) -> list[str]:
        """All names under which clients may ask."""
        return [*self._rules, *self._aliases]

    def model(self, name: str | None) -> str:
        """The model's own name; of the only one, where clients name none, as engines by themselves
        have it. Raise ApiError 404 where there is no such model, 400 where it must be named."""
        if name is None and len(self._rules) == 1:
            return next(iter(self._rules))
        if name is None:
            raise ApiError(
                400, "`model` is missing; GET /v1/models lists what is served", param="model"
            )
        found = self._aliases.get(name, name)
        if found not in self._rules:
            known = self.names
            raise ApiError(
                404, f"no model {name[:100]!r} here; GET /v1/models lists what is served"
                + did_you_mean(name[:100], known)
            )  # fmt: skip
        return found

    def running(self, model: str, change: int) -> None:
        """Count the requests of a model."""
        self._running[model] += change

    def candidates(self, model: str, body: Body, priority: str | None) -> list[Serving]:
        """The backends of the first rule that holds, the least busy first."""
        rules = self._rules[model]
        rule = next(one for one in rules if self._holds(one, model, body, priority))
        return sorted((self._backends[name] for name in rule.backend), key=lambda one: one.load)

    def _holds(self, rule: Rule, model: str, body: Body, priority: str | None) -> bool:
        if rule.priority is not None and (priority or "").lower() not in map(
            str.lower, rule.priority
        ):
            return False
        if rule.running_over is not None and self._running[model] <= rule.running_over:
            return False
        over = rule.prompt_characters_over
        return over is None or prompt_characters(body.content) > over


def prompt_characters(content: Mapping[str, Any]) -> int:
    """Characters of all text in the messages or the prompt; a token id counts as four."""
    messages = content.get("messages")
    if isinstance(messages, list):
        return sum(_length(m.get("content")) for m in messages if isinstance(m, dict))
    return _length(content.get("prompt"))


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return _CHARACTERS_A_TOKEN
    if isinstance(value, dict):
        return _length(value.get("text"))
    return sum(map(_length, value)) if isinstance(value, list) else 0
