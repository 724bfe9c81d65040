"""Passes that wait: what they reach is what running anew reaches, whatever changed meanwhile."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from quantkit.decoder.activations import Activations
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.models.checkpoint import Checkpoint
from quantkit.quantize import passes
from quantkit.quantize.passes import Passes

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
STREAMS = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}

Run = Callable[[torch.Tensor, nn.Module], torch.Tensor]


@pytest.fixture
def block(tiny_llama: Path) -> tuple[nn.Module, Activations, Run]:
    blocks = DecoderBlocks(Checkpoint.open(tiny_llama))
    inputs = blocks.embed(torch.arange(600).reshape(12, 50) % 500)
    inputs = Activations(inputs.shape, batch=5, device=torch.device("cpu"))
    for number in range(3):
        inputs.replace(number, torch.randn(5 if number < 2 else 2, 50, inputs.shape[-1]))
    return blocks.load(0), inputs, lambda batch, module: blocks.run(0, module, batch)


def _inputs(module: nn.Module, run: Run, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """What linears and norms are given in a pass of its own, (tokens, in), by name."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, given: seen.update({name: given[0].flatten(0, -2)})

    names = (*LINEARS, *STREAMS.values())
    hooks = [module.get_submodule(n).register_forward_pre_hook(watch(n)) for n in names]
    run(batch, module)
    for hook in hooks:
        hook.remove()
    return seen


def _halve(module: nn.Module, linear: str) -> None:
    module.get_parameter(f"{linear}.weight").data *= 0.5


@pytest.mark.parametrize("waiting", [0, 1, 1000])
def test_each_linear_is_reached_with_those_before_it_as_they_are_by_then(
    block: tuple[nn.Module, Activations, Run], waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, inputs, run = block
    pair = 5 * 50 * (inputs.shape[-1] + module.mlp.down_proj.in_features) * 4  # type: ignore[union-attr, operator]
    monkeypatch.setattr(passes, "WAITING_BYTES", waiting * pair)
    naive = copy.deepcopy(module)
    before = threading.active_count()
    with Passes(module, inputs, run, LINEARS, STREAMS) as found:
        for linear in LINEARS:
            for batch, reached in zip(inputs, found.reach(linear), strict=True):
                seen = _inputs(naive, run, batch)
                assert torch.equal(reached.inputs, seen[linear])
                if linear in STREAMS:
                    assert reached.stream is not None
                    assert torch.equal(reached.stream, seen[STREAMS[linear]])
                else:
                    assert reached.stream is None
            assert threading.active_count() == before + min(waiting, 3)
            _halve(module, linear)
            _halve(naive, linear)
        expected = [run(batch, naive) for batch in inputs]
        found.finish()
    assert torch.equal(torch.cat(list(inputs)), torch.cat(expected))
    assert threading.active_count() == before


def test_passes_that_are_given_up_end(block: tuple[nn.Module, Activations, Run]) -> None:
    module, inputs, run = block
    before = threading.active_count()
    with Passes(module, inputs, run, LINEARS, STREAMS) as found:
        list(found.reach(LINEARS[0]))
        assert threading.active_count() == before + 3
    assert threading.active_count() == before
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_an_error_in_a_pass_is_raised_where_it_is_waited_for(
    block: tuple[nn.Module, Activations, Run],
) -> None:
    module, inputs, run = block

    def fail(batch: torch.Tensor, module: nn.Module) -> torch.Tensor:
        run(batch, module)
        raise MemoryError("no room")

    before = threading.active_count()
    with Passes(module, inputs, fail, LINEARS[:1], STREAMS) as found:
        list(found.reach(LINEARS[0]))
        with pytest.raises(MemoryError, match="no room"):
            found.finish()
    assert threading.active_count() == before
