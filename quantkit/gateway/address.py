"""Where a server is, and a command that asks it something."""

from __future__ import annotations

import ipaddress
import json
import shlex


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def base_url(host: str, port: int) -> str:
    """What a client of the OpenAI API on this machine calls its base URL."""
    found = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{found}]' if ':' in found else found}:{port}/v1"


def curl_example(url: str, model: str, *, keyed: bool) -> str:
    """A command that asks ``model`` something, with the key out of ``$API_KEY``."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    key = '-H "Authorization: Bearer $API_KEY" ' if keyed else ""
    return (
        f"curl {url}/chat/completions {key}-H 'Content-Type: application/json' "
        f"-d {shlex.quote(body)}"
    )
