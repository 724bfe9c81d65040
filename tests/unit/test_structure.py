"""What blocks are made of: found by asking, where tables are right and where they are wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from quantkit.decoder.blocks import DecoderBlocks
from quantkit.decoder.structure import Fold, FoldChannels, Structure, find, fold_error
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import plan
from tests.integration.gguf_cases import CASES, make
from tests.models import make_checkpoint

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
ATTENTION = (
    Fold("input_layernorm", QKV, given=QKV[0]),
    Fold(
        "self_attn.v_proj",
        ("self_attn.o_proj",),
        given="self_attn.o_proj",
        channels=FoldChannels(heads=2, copies=2),
    ),
)
MLP = (
    Fold("post_attention_layernorm", GATE_UP, given=GATE_UP[0]),
    Fold("mlp.up_proj", ("mlp.down_proj",), given="mlp.down_proj"),
)
LLAMA = Structure(
    calls=(*QKV, "self_attn.o_proj", *GATE_UP, "mlp.down_proj"),
    inputs=(QKV, ("self_attn.o_proj",), GATE_UP, ("mlp.down_proj",)),
    writers={
        "self_attn.o_proj": "input_layernorm",
        "mlp.down_proj": "post_attention_layernorm",
    },
    folds=ATTENTION + MLP,
    unfolded={},
)
EXPERTS = tuple(f"mlp.experts.{number}" for number in range(6))
MIXTURE = Structure(
    calls=(
        *QKV,
        "self_attn.o_proj",
        *(f"{one}.{n}_proj" for one in EXPERTS for n in ("gate", "up", "down")),
    ),
    inputs=(
        QKV,
        ("self_attn.o_proj",),
        *(
            group
            for one in EXPERTS
            for group in ((f"{one}.gate_proj", f"{one}.up_proj"), (f"{one}.down_proj",))
        ),
    ),
    writers={"self_attn.o_proj": "input_layernorm"},
    folds=(
        *ATTENTION,
        Fold(
            "post_attention_layernorm",
            tuple(f"{one}.{name}_proj" for one in EXPERTS for name in ("gate", "up")),
            routers=("mlp.gate",),
            given="mlp.gate",
        ),
        *(
            Fold(f"{one}.up_proj", (f"{one}.down_proj",), given=f"{one}.down_proj")
            for one in EXPERTS
        ),
    ),
    unfolded={},
)
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
FAMILIES: dict[str, tuple[dict[str, Any], list[Structure]]] = {
    "llama": ({}, [LLAMA, LLAMA]),
    "mistral": ({}, [LLAMA, LLAMA]),
    "qwen2": ({}, [LLAMA, LLAMA]),
    "qwen3": ({"head_dim": 64}, [LLAMA, LLAMA]),
    "mixtral": ({**MOE, "num_local_experts": 6}, [MIXTURE, MIXTURE]),
    "qwen3_moe": (
        {**MOE, "num_experts": 6, "moe_intermediate_size": 64, "mlp_only_layers": [1]},
        [MIXTURE, LLAMA],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_structure_of_known_families_is_what_is_known_of_them(
    family: str, tmp_path: Path
) -> None:
    settings, expected = FAMILIES[family]
    blocks = DecoderBlocks(Checkpoint.open(make_checkpoint(tmp_path, family=family, **settings)))
    assert [blocks.structure(index) for index in range(2)] == expected


def test_blocks_of_one_kind_are_asked_once(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = DecoderBlocks(Checkpoint.open(tiny_llama))
    first = blocks.structure(0)
    monkeypatch.setattr("quantkit.decoder.structure.ask", None)
    assert blocks.structure(1) is first


WIDTH, HEADS, HEAD = 32, 4, 8


class Norm(nn.Module):
    """RMS norm in float32, as transformers' are; ``offset`` + weight."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5 - offset)
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * (self.offset + self.weight.float())).type_as(x)


class Attention(nn.Module):
    """Four heads, two of them of keys and values; with what may stand between the linears."""

    def __init__(self, norms: bool, gate: str) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD)
        self.k_proj = nn.Linear(WIDTH, HEADS * HEAD // 2)
        self.v_proj = nn.Linear(WIDTH, HEADS * HEAD // 2)
        self.o_proj = nn.Linear(HEADS * HEAD, WIDTH)
        self.q_norm = Norm(HEAD) if norms else nn.Identity()
        self.k_norm = Norm(HEAD) if norms else nn.Identity()
        self.v_norm = Norm(HEADS * HEAD) if gate == "norm" else nn.Identity()
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (-1, HEAD)).transpose(1, 2)

        q, k = self.q_norm(heads(self.q_proj(x))), self.k_norm(heads(self.k_proj(x)))
        k, v = k.repeat_interleave(2, 1), heads(self.v_proj(x)).repeat_interleave(2, 1)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.v_norm(y.transpose(1, 2).flatten(2))
        if self.gate == "of itself":
            y = y * y.sigmoid()
        output: torch.Tensor = self.o_proj(y)
        return output


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48)
        self.down_proj = nn.Linear(48, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class Block(nn.Module):
    """A block of Llama's names, with what Llama has not."""

    def __init__(
        self,
        *,
        offset: float = 0.0,
        after: bool = False,
        parallel: bool = False,
        norms: bool = False,
        gate: str = "",
        multiplier: float = 1.0,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.input_layernorm = Norm(WIDTH, offset)
        self.self_attn = Attention(norms, gate)
        self.after = Norm(WIDTH, offset) if after else nn.Identity()
        self.post_attention_layernorm = Norm(WIDTH, offset)
        self.mlp = GatedMLP()
        self.parallel, self.multiplier, self.skip = parallel, multiplier, skip

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = self.input_layernorm(hidden)
        attended = self.after(self.self_attn(x)) * self.multiplier
        if self.parallel:
            return hidden + attended + self.mlp(x)
        stream = hidden + attended
        y = self.post_attention_layernorm(stream)
        return stream + self.mlp(y) + (y if self.skip else 0)


def made(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return Block(**settings).double().requires_grad_(False)


HIDDEN = torch.randn(1, 12, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def with_offset(offset: float) -> tuple[Fold, ...]:
    return tuple(
        replace(fold, offset=offset) if "layernorm" in fold.smooth_layer else fold
        for fold in LLAMA.folds
    )


BOTH = (*QKV, *GATE_UP)
NOTHING = "nothing before it takes a scale"
FAULTS: dict[str, tuple[dict[str, Any], Structure, set[str]]] = {
    "Llama's own": ({}, LLAMA, set()),
    "1 + weight": (
        {"offset": 1.0},
        replace(LLAMA, folds=with_offset(1.0)),
        {"input_layernorm", "post_attention_layernorm"},
    ),
    "norm after attention": (
        {"after": True},
        replace(LLAMA, writers={"mlp.down_proj": "post_attention_layernorm"}),
        set(),
    ),
    "attention is scaled": (
        {"multiplier": 0.22},
        replace(LLAMA, writers={"mlp.down_proj": "post_attention_layernorm"}),
        set(),
    ),
    "parallel": (
        {"parallel": True},
        replace(
            LLAMA,
            inputs=(BOTH, ("self_attn.o_proj",), ("mlp.down_proj",)),
            writers={"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "input_layernorm"},
            folds=(
                Fold("input_layernorm", BOTH, given=QKV[0]),
                ATTENTION[1],
                MLP[1],
            ),
        ),
        {"input_layernorm", "post_attention_layernorm"},
    ),
    "norms of q and k": ({"norms": True}, LLAMA, set()),
    "gate of v": (
        {"gate": "of itself"},
        replace(
            LLAMA,
            folds=(ATTENTION[0], *MLP),
            unfolded={"self_attn.o_proj": NOTHING},
        ),
        {"self_attn.v_proj"},
    ),
    "norm of v": (
        {"gate": "norm"},
        replace(
            LLAMA,
            folds=(
                ATTENTION[0],
                Fold("self_attn.v_norm", ("self_attn.o_proj",), given="self_attn.o_proj"),
                *MLP,
            ),
        ),
        {"self_attn.v_proj"},
    ),
    "the norm's output is added": (
        {"skip": True},
        replace(
            LLAMA,
            writers={"mlp.down_proj": "post_attention_layernorm"},
            folds=(*ATTENTION, MLP[1]),
            unfolded=dict.fromkeys(
                GATE_UP, "the output of post_attention_layernorm is used elsewhere, too"
            ),
        ),
        {"post_attention_layernorm"},
    ),
}
"""What a block has, its structure, and which of Llama's folds would break it."""


@pytest.mark.parametrize("fault", FAULTS)
def test_structure_of_blocks_that_break_llamas_table(fault: str) -> None:
    settings, expected, broken = FAULTS[fault]
    block = made(**settings)
    assert find(block, HIDDEN, {}) == expected
    for fold in expected.folds:
        assert fold_error(block, fold, HIDDEN, {}) < 1e-12
    wrong = {
        fold.smooth_layer for fold in LLAMA.folds if fold_error(block, fold, HIDDEN, {}) > 1e-3
    }
    assert wrong == broken


@pytest.mark.parametrize("fault", FAULTS)
def test_a_writers_change_comes_out_as_it_is_where_nothing_reads_it(fault: str) -> None:
    """The oracle: cut what follows, and add to what a linear gives."""
    settings, expected, _ = FAULTS[fault]
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        block: Any = made(**settings)
        if name == "self_attn.o_proj":
            block.mlp.down_proj.weight.zero_()
        before = block(HIDDEN)
        delta = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)).double()
        block.get_submodule(name).bias += delta
        unchanged = torch.allclose(block(HIDDEN) - before, delta.expand_as(before), atol=1e-9)
        assert unchanged == (name in expected.writers)


def test_a_block_is_left_as_it_was() -> None:
    block = made(offset=1.0)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    before = block(HIDDEN)
    find(block, HIDDEN, {})
    assert torch.equal(block(HIDDEN), before)
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in block.modules())


def test_a_linear_that_is_not_called_is_no_part_of_the_structure() -> None:
    block: Any = made()
    expected = find(block, HIDDEN, {})
    block.mlp.unused = nn.Linear(4, 4).double()
    assert find(block, HIDDEN, {}) == expected


def test_channels_of_repeated_heads() -> None:
    channels = FoldChannels(heads=2, copies=3)
    assert channels.expand(torch.arange(8)).tolist() == [0, 1, 2, 3] * 3 + [4, 5, 6, 7] * 3
    assert torch.equal(channels.pick(channels.expand(torch.arange(8.0))), torch.arange(8.0))
    assert channels.reduce(torch.arange(24.0)).tolist() == [4, 5, 6, 7, 16, 17, 18, 19]


def test_the_plan_says_what_was_not_proved(tmp_path: Path) -> None:
    """OLMo 2's norms come after attention and MLP, before their output is added."""
    source = Checkpoint.open(make(CASES["olmo-2"], tmp_path / "olmo"))
    blocks = len(DecoderBlocks(source))
    first = "model.layers.0.self_attn"
    unscaled = (
        f"{5 * blocks} linears are not scaled ({NOTHING}): "
        f"{first}.q_proj, {first}.k_proj, {first}.v_proj …"
    )
    alone = (
        f"{blocks} blocks have no linear whose output is added unchanged to the residual stream, "
        "so none corrects the stream's error: model.layers.0, model.layers.1, model.layers.2"
    )
    assert plan(source, Spec.parse("awq:w4g32")).notes == (unscaled, alone)
    assert plan(source, Spec.parse("gptq:w4g32")).notes == (alone,)
