"""Which linears are quantized and how: patterns, fused parts, and what GPTQ's config says."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest

from quantkit.engines.vllm.architectures import USUAL, Fusion
from quantkit.errors import RecipeError
from quantkit.formats import gptq
from quantkit.models.spec import GroupScheme, Spec
from quantkit.producers.linear_options import LinearOptions, dynamic

LINEARS = [
    f"model.layers.{index}.{name}"
    for index in (0, 1, 10)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]
DEFAULT = GroupScheme(4, 64)
FUSION = Fusion(USUAL, USUAL)


def _options(**options: Any) -> tuple[Spec, LinearOptions]:
    spec = Spec.of_entry({"spec": "gptq:w4g64", **options})
    parse = partial(GroupScheme.parse, bits=gptq.BITS, group_sizes=gptq.GROUP_SIZES)
    return spec, LinearOptions.of(spec, parse)


def _schemes(**options: Any) -> dict[str, GroupScheme]:
    spec, parsed = _options(**options)
    return parsed.schemes(spec, DEFAULT, LINEARS, USUAL)


def test_without_options_every_linear_has_the_scheme_of_the_spec() -> None:
    assert _schemes() == dict.fromkeys(LINEARS, DEFAULT)


def test_the_first_pattern_decides_and_skipping_comes_before() -> None:
    found = _schemes(
        skip=r"layers\.1\.mlp", overrides={r"layers\.0\..*down": "w8g32", "down_proj": "w8g-1"}
    )
    assert [name for name in LINEARS if name not in found] == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert {name: str(s) for name, s in found.items() if s != DEFAULT} == {
        "model.layers.0.mlp.down_proj": "w8g32",
        "model.layers.10.mlp.down_proj": "w8g-1",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": ["k_proj"]}, r"k_proj: skipped.*|run these as one linear"),
        ({"overrides": {"up_proj": "w8g64"}}, r"gate_proj: w4g64, .*up_proj: w8g64"),
        ({"skip": "down_prj"}, r"'down_prj' is found in no linear"),
        ({"skip": "_proj"}, "leaves nothing"),
        ({"skip": "("}, "not a regular expression"),
        ({"skip": [3]}, "not a regular expression"),
        ({"overrides": {"down_proj": "w5g64"}}, "unknown scheme 'w5g64'"),
        ({"overrides": "down_proj"}, "expected patterns and schemes"),
        ({"rounding": "best"}, "expected closed-form or learned"),
        ({"rounding": "learned", "iters": 0}, "a whole number above 0"),
        ({"iters": 10}, "iters is for rounding: learned"),
        ({"round": "learned"}, r"unknown option 'round'.*rounding"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        _schemes(**options)
    assert "\n" not in str(raised.value)


def test_awq_has_one_scheme() -> None:
    spec = Spec.of_entry({"spec": "awq:w4g64", "overrides": {"down_proj": "w4g32"}})
    with pytest.raises(RecipeError, match="unknown option 'overrides'; awq takes rounding, iters"):
        LinearOptions.of(spec)


def _vllm(config: dict[str, dict[str, int]], name: str, key: str, default: int) -> int | bool:
    """How vLLM (and GPTQModel, with the names of parts) asks ``dynamic``."""
    for pattern, settings in config.items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), name):
                return False
        elif re.match(pattern.removeprefix("+:"), name):
            return settings.get(key, default)
    return default


def test_dynamic_says_the_same_of_fused_linears_and_of_their_parts() -> None:
    schemes = _schemes(
        skip=r"layers\.1\.self_attn\.[qkv]", overrides={r"layers\.10\.mlp\.(gate|up)": "w8g32"}
    )
    config = dynamic(DEFAULT, schemes, LINEARS, FUSION)
    for name in LINEARS:
        scheme = schemes.get(name)
        assert _vllm(config, name, "bits", 4) == (scheme.bits if scheme else False)
        assert _vllm(config, name, "group_size", 64) == (scheme.group_size if scheme else False)
    assert _vllm(config, "model.layers.1.self_attn.qkv_proj", "bits", 4) is False
    assert _vllm(config, "model.layers.10.mlp.gate_up_proj", "bits", 4) == 8
    assert _vllm(config, "model.layers.10.self_attn.qkv_proj", "bits", 4) == 4
    assert _vllm(config, "model.layers.0.mlp.gate_up_proj", "bits", 4) == 4
    assert dynamic(DEFAULT, _schemes(), LINEARS, FUSION) == {}
