"""The tokenizer inside a GGUF, in llama.cpp, without the weights."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp

from quantkit.engines.llamacpp.context import error, listen
from quantkit.errors import CheckpointError
from quantkit.formats.gguf.model_file import ModelFile
from quantkit.formats.gguf.vocabulary import TokenType

_ROOM = 4096
_CONTROL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
_NORMAL = int(TokenType.NORMAL)
_MARKED = _CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED


class Vocabulary:
    """Reads text as llama.cpp does with the GGUF at ``path``; loaded within ``with``.

    Raise CheckpointError, on entering, for a vocabulary over which llama.cpp would abort,
    EngineError for a file that it refuses.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._model: Any = None
        self._tokens = (ctypes.c_int32 * _ROOM)()

    def __enter__(self) -> Vocabulary:
        model = ModelFile.open(self._path)
        _check(model)
        self._types = model.array("tokenizer.ggml.token_type")
        listen()
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(self._path), settings)
        if not self._model:
            raise error("cannot load the vocabulary", self._path)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        asked = {"bos": self.adds_bos, "eos": llama_cpp.llama_vocab_get_add_eos(self._vocabulary)}
        for role in (role for role, added in asked.items() if added and self.role(role) is None):
            self._free()
            raise CheckpointError(
                f"{self._path}: every text is to get a {role.upper()}, and there is no "
                f"tokenizer.ggml.{role}_token_id; llama.cpp would abort"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._free()

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The ids of ``text``, with BOS and EOS where the file asks for them (``add_special``), its
        control tokens read as such (``parse_special``) or as plain text."""
        data = text.encode()
        arguments = (self._vocabulary, data, len(data))
        count = llama_cpp.llama_tokenize(
            *arguments, self._tokens, len(self._tokens), add_special, parse_special
        )
        if count < 0:
            self._tokens = (ctypes.c_int32 * -count)()
            count = llama_cpp.llama_tokenize(
                *arguments, self._tokens, len(self._tokens), add_special, parse_special
            )
        return self._tokens[:count]

    def __len__(self) -> int:
        return int(llama_cpp.llama_vocab_n_tokens(self._vocabulary))

    @property
    def adds_bos(self) -> bool:
        """Whether every text, and every chat, begins with BOS."""
        return bool(llama_cpp.llama_vocab_get_add_bos(self._vocabulary))

    def role(self, name: str) -> int | None:
        """The token that has a role (``bos``, ``fim_pad``); None where none has it."""
        token = int(getattr(llama_cpp, f"llama_vocab_{name}")(self._vocabulary))
        return None if token == llama_cpp.LLAMA_TOKEN_NULL else token

    def is_end(self, token: int) -> bool:
        """Whether an answer ends at a token."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocabulary, token))

    def text(self, token: int) -> str:
        """How the file writes a token; empty for an id that it does not have."""
        if not 0 <= token < len(self):
            return ""
        found: bytes = llama_cpp.llama_vocab_get_text(self._vocabulary, token)
        return found.decode(errors="replace")

    def is_control(self, token: int) -> bool:
        """Whether a token is read as one only with ``parse_special``, and never shown."""
        return bool(llama_cpp.llama_vocab_get_attr(self._vocabulary, token) & _CONTROL)

    def marked(self) -> list[str]:
        """The tokens that are read as one wherever they stand, not made of others; as text. They
        are those that the file marks, and some whose text llama.cpp knows."""
        kind_of, vocabulary = llama_cpp.llama_vocab_get_attr, self._vocabulary
        return [self.text(at) for at in range(len(self)) if kind_of(vocabulary, at) & _MARKED]

    def marked_by_look(self) -> list[str]:
        """Those of them that the file has as text, and llama.cpp takes for control tokens because
        they look like some (``</s>`` in Qwen's vocabulary)."""
        return [
            self.text(at)
            for at, kind in enumerate(self._types)
            if kind == _NORMAL and self.is_control(at)
        ]

    def _free(self) -> None:
        llama_cpp.llama_model_free(self._model)
        self._model = None


def _check(model: ModelFile) -> None:
    """Refuse what llama.cpp asserts or throws over, which would end this process."""
    path = model.files[0]
    tokens = model.array("tokenizer.ggml.tokens")
    whole = [text for text in tokens if "\ufffd" not in text]  # the others are not read exactly
    if len(set(whole)) < len(whole):
        twice, _ = Counter(whole).most_common(1)[0]
        raise CheckpointError(
            f"{path}: the token {twice!r} is in its vocabulary twice; llama.cpp would abort"
        )
    if model.metadata.get("tokenizer.ggml.model") == "llama":
        known = set(tokens)
        for byte in range(256):
            if f"<0x{byte:02X}>" not in known and chr(byte) not in known:
                raise CheckpointError(
                    f"{path}: its SentencePiece vocabulary has no token <0x{byte:02X}> for text "
                    "that no other token covers; llama.cpp would abort on it"
                )
