"""llama-server: how it is started."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import MappingProxyType

import psutil

from quantkit.engines.llamacpp.chats import chat_settings
from quantkit.engines.llamacpp.kv_cache import kv_cache_type, needs_flash_attention
from quantkit.engines.server import ServeOptions, ServerCommand, asked, start_timeout
from quantkit.formats.gguf.model_file import ModelFile
from quantkit.models.engine_config import Option, words
from quantkit.models.variant import Model, Variant
from quantkit.system.machine import gpu
from quantkit.toolchains.llama_programs import Program

_WHOLE = {"LLAMA_ARG_N_GPU_LAYERS": "999", "LLAMA_ARG_FIT": "off"}
"""All layers on the GPU, or an error: by itself llama-server leaves layers on the CPU where another
engine has taken the memory, and answers many times more slowly. Options on the command line are
stronger; versions that never do so ignore the second."""
_STAMP = r"^(\d+)\.(\d+)\.(\d+)\.(\d+) .*"
_LOADING = re.compile(_STAMP + "loading model", re.MULTILINE)
_LOADED = re.compile(_STAMP + "model loaded", re.MULTILINE)


def server_command(
    server: Program,
    model: Model,
    options: ServeOptions,
    own: Mapping[str, Option] = MappingProxyType({}),
) -> ServerCommand:
    """The command line, with the engine's ``own`` options at its end; the key goes through the
    environment, where ``ps`` does not show it.

    Raise CheckpointError where the model's file is damaged.
    """
    options, rest = asked(options, own)
    argv = [
        str(server.path),
        "--model", str(model.weights),
        # llama-server takes it for several names where there is a comma.
        "--alias", (options.model_name or model.id).replace(",", "-"),
        "--host", options.host,
        "--port", str(options.port),
        "--parallel", str(options.slots),
        "--threads", str(psutil.cpu_count(logical=False) or os.cpu_count() or 1),
        "--metrics",
        "--no-webui",
    ]  # fmt: skip
    if options.context is None:
        # 0: the model's own maximum, once, in a cache that all slots draw from.
        argv += ["--ctx-size", "0", "--kv-unified"]
    else:
        argv += ["--ctx-size", str(options.context * options.slots)]
    if not options.prefix_cache:
        argv += ["--no-cache-prompt", "--cache-ram", "0"]
    chats = chat_settings(model, ModelFile.open(model.weights).metadata)
    argv += chats.arguments
    if isinstance(model, Variant) and model.manifest:
        overrides = model.manifest.override_kv.items()
        argv += [word for k, v in overrides for word in ("--override-kv", f"{k}=int:{v}")]
    argv += _own(rest)
    env = {**server.env, **chats.env}
    if gpu():
        env |= _WHOLE
    if options.api_key is not None:
        env["LLAMA_API_KEY"] = options.api_key
    return ServerCommand(tuple(argv), env, start_timeout_s=start_timeout(model.bytes))


def _own(options: Mapping[str, Option]) -> list[str]:
    """The user's options as flags: ``kv_cache`` sets the type of both keys and values."""
    rest = {name: value for name, value in options.items() if name != "kv_cache"}
    if "kv_cache" not in options:
        return words(rest)
    kind = kv_cache_type(options)
    cache = ["--cache-type-k", kind, "--cache-type-v", kind]
    if needs_flash_attention(kind) and "flash_attn" not in rest:
        cache += ["--flash-attn", "on"]
    return [*cache, *words(rest)]


def load_seconds(log: str) -> float | None:
    """Between two lines of llama-server's log, which begin with ``minutes.seconds.ms.us``."""
    start, end = (_LOADING.search(log), _LOADED.search(log))
    if not start or not end:
        return None
    return _seconds(end) - _seconds(start)


def _seconds(stamp: re.Match[str]) -> float:
    minutes, seconds, milliseconds, microseconds = map(int, stamp.groups())
    return 60 * minutes + seconds + milliseconds / 1e3 + microseconds / 1e6
