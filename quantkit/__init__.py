"""quantkit: from a transformers checkpoint to the quantized variant to ship, with proof.

``import quantkit as qk`` is quick: each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.api import (
        bench,
        convert,
        evaluate,
        inspect,
        open,
        plan,
        profiles,
        recipe,
        recommend,
        report,
        run,
        serve,
        verify,
    )
    from quantkit.benchmark.section import BenchSection
    from quantkit.data.section import CalibrationSection
    from quantkit.errors import (
        CheckpointError,
        ConversionError,
        EngineError,
        EvaluationError,
        IncompatibleVariant,
        QuantkitError,
        RecipeError,
        ToolchainError,
    )
    from quantkit.evaluation.section import EvaluateSection
    from quantkit.ledger import Ledger
    from quantkit.models.checkpoint import Checkpoint
    from quantkit.models.engine_config import EngineConfig
    from quantkit.models.spec import Spec
    from quantkit.models.variant import Variant
    from quantkit.recommendation import Wants
    from quantkit.runs.recipe import Recipe
    from quantkit.system.progress import Progress, show_progress

_WHERE = {
    "quantkit.api": (
        "bench", "convert", "evaluate", "inspect", "open", "plan", "profiles", "recipe",
        "recommend", "report", "run", "serve", "verify",
    ),
    "quantkit.benchmark.section": ("BenchSection",),
    "quantkit.data.section": ("CalibrationSection",),
    "quantkit.errors": (
        "CheckpointError", "ConversionError", "EngineError", "EvaluationError",
        "IncompatibleVariant", "QuantkitError", "RecipeError", "ToolchainError",
    ),
    "quantkit.evaluation.section": ("EvaluateSection",),
    "quantkit.ledger": ("Ledger",),
    "quantkit.models.checkpoint": ("Checkpoint",),
    "quantkit.models.engine_config": ("EngineConfig",),
    "quantkit.models.spec": ("Spec",),
    "quantkit.models.variant": ("Variant",),
    "quantkit.recommendation": ("Wants",),
    "quantkit.runs.recipe": ("Recipe",),
    "quantkit.system.progress": ("Progress", "show_progress"),
}  # fmt: skip
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "BenchSection", "CalibrationSection", "Checkpoint", "CheckpointError", "ConversionError",
    "EngineConfig", "EngineError", "EvaluateSection", "EvaluationError", "IncompatibleVariant",
    "Ledger", "Progress", "QuantkitError", "Recipe", "RecipeError", "Spec", "ToolchainError",
    "Variant", "Wants", "__version__", "bench", "convert", "evaluate", "inspect", "open", "plan",
    "profiles", "recipe", "recommend", "report", "run", "serve", "show_progress", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
