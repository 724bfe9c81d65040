"""Record many small GPU launches once, then replay them as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` itself on the CPU; on a GPU, a CUDA graph of it for each shape of its inputs.

    ``function`` takes tensors and plain values, returns tensors, changes none of its inputs and
    waits for nothing. What the result holds is valid until the next call. The graphs, with the
    memory that they work in, live as long as what is returned here.
    """
    graphs: dict[Any, Any] = {}

    def call(*inputs: Any) -> Any:
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        if tensors[0].device.type != "cuda":
            return function(*inputs)
        key = tuple(v.shape if isinstance(v, torch.Tensor) else v for v in inputs)
        if key not in graphs:
            graphs[key] = _capture(function, inputs)
        graph, places, result = graphs[key]
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        return result

    return call


def _capture(function: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """The graph, the tensors that it reads, and what it writes."""
    own = [v.clone() if isinstance(v, torch.Tensor) else v for v in inputs]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a first run outside of the graph loads what it needs
        function(*own)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*own)
    return graph, [value for value in own if isinstance(value, torch.Tensor)], result
