"""transformers: the reference engine. Quantized checkpoints are scored by unpacking their weights.

Exact on any device and without kernels: what differs from the source is what quantization did.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from types import MappingProxyType

from quantkit.engines.base import Capabilities, check_format
from quantkit.engines.transformers.scorer import TransformersScorer
from quantkit.engines.transformers.weights import check as check_weights
from quantkit.errors import RecipeError, ToolchainError
from quantkit.models.checkpoint import FORMAT, Checkpoint
from quantkit.models.engine_config import Option
from quantkit.models.variant import Model

__all__ = ["Transformers", "TransformersScorer"]


class Transformers:
    """Runs safetensors, GPTQ, AWQ and compressed-tensors in this process; does not serve.

    Option ``batch``: a factor for the number of tokens that are computed at once. ``inputs``:
    ``exact`` leaves the inputs of linears as they are where the engines that serve round them.
    """

    name = "transformers"
    capabilities = Capabilities(
        formats=frozenset({FORMAT, "gptq", "awq", "compressed-tensors"}),
        logits="full",
        serves=False,
        devices=("cpu", "cuda"),
    )

    def __init__(self, options: Mapping[str, Option] = MappingProxyType({})) -> None:
        self.options = options

    def version(self) -> str | None:
        """The installed version, or None."""
        try:
            return importlib.metadata.version("transformers")
        except importlib.metadata.PackageNotFoundError:
            return None

    def check(self, model: Model) -> None:
        """Raise IncompatibleVariant for a format or a model that is not read here, CheckpointError
        for a checkpoint that is not what its config.json says."""
        if self.version() is None:
            raise ToolchainError("transformers is not installed; run: pip install quantkit")
        check_format(self, model)
        self._options()
        if isinstance(model, Checkpoint):
            check_weights(model)

    def scorer(self, model: Model, context: int) -> TransformersScorer:
        """Load ``model``; ``context`` costs nothing here."""
        self.check(model)
        batch, exact = self._options()
        return TransformersScorer(model, context, batch, exact_inputs=exact)

    def _options(self) -> tuple[int, bool]:
        """``batch``, and whether inputs stay exact; raise RecipeError for any other option or
        value."""
        for name in self.options:
            if name not in ("batch", "inputs"):
                raise RecipeError(
                    f"transformers: unknown option {name!r}; it takes batch and inputs"
                )
        batch = self.options.get("batch", 1)
        if not isinstance(batch, int) or batch < 1:
            raise RecipeError(f"transformers: batch is {batch!r}, expected a whole number above 0")
        inputs = self.options.get("inputs", "as-served")
        if inputs not in ("as-served", "exact"):
            raise RecipeError(f"transformers: inputs is {inputs!r}, expected as-served or exact")
        return batch, inputs == "exact"

    def language_model(self, model: Model, context: int) -> TransformersScorer:
        """The scorer: it writes as well."""
        return self.scorer(model, context)
