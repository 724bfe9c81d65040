from __future__ import annotations

import hmac
from types import SimpleNamespace
from typing import Any

import pytest

from quantkit.serve.answers import ApiError
from quantkit.serve.limits import Key


def asking(authorization: str) -> Any:
    return SimpleNamespace(headers={"Authorization": authorization})


def test_a_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is sent, one comparison of equally many bytes that does not stop early."""
    compared: list[tuple[int, int]] = []

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", watched)
    key = Key("right")
    sent = ["", "Bearer", "Bearer r", "Bearer righ", "Bearer righT", "Basic right", "x" * 10_000,
            "Bearer \udcff"]  # fmt: skip
    for authorization in sent:
        with pytest.raises(ApiError, match="expected `Authorization"):
            key.check(asking(authorization))
    key.check(asking("Bearer right"))
    key.check(asking("bearer  right"))
    assert compared == [(32, 32)] * (len(sent) + 2)
