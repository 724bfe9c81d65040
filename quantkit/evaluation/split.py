"""A loss taken apart: on the same windows, one thing is changed at a time.

With b the source in the reference engine, p the unquantized GGUF in llama.cpp, q the variant's
unpacked weights in the reference engine and s the variant on the engine that serves it, each a
mean negative log likelihood:

    s - b  =  (p - b)  +  (q - b)  +  (s - q - p + b)
    total     conversion  quantization  engine

Where the engine is told to round activations as well (W8A8, FP8), q does so, too, and r is the same
with activations left alone: then r - b is quantization, and q - r activations.

The engine's part is what it computes otherwise with the quantized weights than with the source's:
rounding of activations, which ggml quantizes to 8 bits beside quantized weights, and kernels. What
it does to both alike (a 16-bit cache, the order of sums) is in the conversion. Where a GGUF cannot
be turned back into weights for the reference engine, its weights are unpacked to an F32 GGUF, u in
llama.cpp, and q = u - p + b: then quantization is u - p, and engine s - u. Where nothing is
converted (GPTQ, AWQ), p = b: all that the engine does is in its part, also what it would do to the
source, which is its noise floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from quantkit.engines.base import serving
from quantkit.errors import EvaluationError
from quantkit.ledger.loss import Part
from quantkit.system.progress import track

if TYPE_CHECKING:
    from quantkit.engines.base import Engine
    from quantkit.engines.process import RunningServer
    from quantkit.evaluation.perplexity import Windows
    from quantkit.models.variant import Model


def parts(
    base: Sequence[float],
    own: Sequence[float] | None,
    served: Sequence[float] | None,
    plain: Sequence[float] | None,
    weights: Sequence[float] | None = None,
) -> dict[str, Part]:
    """``conversion``, ``quantization``, ``activations`` and ``engine`` as far as they are known,
    and ``total``.

    Means of each window, nats per token: b, q, s, p and r of the module's equations. Without
    ``plain`` nothing was converted, without ``weights`` activations are not rounded. Without
    ``own`` what is not conversion is known only as a whole, and not shown; without ``served`` the
    total is of what there is.
    """
    converted = None if plain is None else np.subtract(plain, base)
    columns = {
        "conversion": converted,
        "quantization": None if own is None else np.subtract(weights or own, base),
        "activations": None if own is None or weights is None else np.subtract(own, weights),
        "engine": None
        if own is None or served is None
        else np.subtract(served, own) - (0 if converted is None else converted),
    }
    known = {name: column for name, column in columns.items() if column is not None}
    whole = np.sum(list(known.values()), 0) if served is None else np.subtract(served, base)
    return {name: part(column) for name, column in known.items()} | {"total": part(whole)}


def part(windows: ArrayLike) -> Part:
    """Mean ± s/√n of one value a window."""
    values = np.asarray(windows, dtype=np.float64)
    n = len(values)
    return Part(
        value=float(values.mean()),
        stderr=float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None,
    )


def window_likelihoods(
    model: Model, engine: Engine, windows: Windows, server: RunningServer | None = None
) -> list[float]:
    """Mean negative log likelihood of each window's scored tokens, nats, on any engine.

    ``server``: one of the engine's that runs with this model already. Over the engine's own
    vocabulary: rows by which the model's is padded are not cut. Raise EvaluationError for values
    that are not finite, and what the engine raises.
    """
    first = [windows.first + 1] * len(windows.ids)
    attached = None
    if server is not None:
        attached = serving(engine, model).attached(model, server, windows.context)
    with attached or engine.language_model(model, windows.context) as scorer:
        found = scorer.likelihoods(windows.ids, first)
        what = f"{model.id}: windows in {engine.name}"
        means = [
            -float(scores.log_probs.double().mean())
            for scores in track(found, what, len(windows.ids))
        ]
    bad = sum(not math.isfinite(mean) for mean in means)
    if bad:
        raise EvaluationError(
            f"{model.path}: {engine.name} gives non-finite likelihoods in {bad} of {len(means)} "
            "windows"
        )
    return means
