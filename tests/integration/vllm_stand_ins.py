"""Modules that vLLM's images and sounds need, stood in for where they are not installed.

Also language models cannot be imported without some of them, although they compute nothing there.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from typing import Any
from unittest.mock import MagicMock

_NAMES = ("torchvision", "torchaudio", "timm", "librosa", "soundfile", "av")


class _StandIn(MagicMock):
    """A package from which everything can be imported."""

    __path__: list[str] = []  # noqa: RUF012
    __version__ = "99.0"


class _Finder:
    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, name: str, *_: Any) -> Any:
        """Of a stand-in, for what is missing."""
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> Any:
        """The stand-in."""
        return _StandIn(name=spec.name)

    def exec_module(self, module: Any) -> None:
        """Nothing is run."""


def stand_in() -> None:
    """From now on; transformers, which goes by what is installed, has to look before that."""
    import transformers.utils.import_utils as installed

    for asks in (installed.is_torchvision_available, installed.is_torchaudio_available):
        asks()
    missing = [name for name in _NAMES if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_Finder(missing))  # type: ignore[arg-type]
