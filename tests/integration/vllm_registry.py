"""Run by vLLM's own Python: what it says of every architecture that generates text.

``python -I vllm_registry.py OUT`` writes JSON: the version, and for each architecture ``code``,
whose implementation is run (``vllm`` or ``transformers``); ``needs``, a package that is not
installed and without which it does not load, so that it is stood in for; ``fused``, the linears
that are run as one, by the name of that one; ``undeclared``, those of these that it does not name
where it is asked what is quantized; ``called``, modules that it calls otherwise
there; ``renamed``, what it puts in place of parts of all names.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # -I leaves it out
from vllm_stand_ins import stand_in

_NOTHING: dict[str, Any] = {"fused": {}, "undeclared": [], "called": {}, "renamed": []}


def _declared(cls: Any, module: ast.Module) -> dict[str, list[str]]:
    """What a class says is fused, and what its module adds for some configurations."""
    declared = getattr(cls, "packed_modules_mapping", None)
    return (dict(declared) if isinstance(declared, dict) else {}) | dict(_added(module))


def _added(module: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """``self.packed_modules_mapping["…"] = […]``."""
    for node in ast.walk(module):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Subscript):
            continue
        target = node.targets[0]
        if ast.unparse(target.value).endswith(".packed_modules_mapping"):
            yield ast.literal_eval(target.slice), ast.literal_eval(node.value)


def _stacked(cls: Any) -> dict[str, list[str]]:
    """What it loads into one parameter."""
    mapper = getattr(cls, "hf_to_vllm_mapper", None)
    found: dict[str, list[str]] = {}
    for part, (whole, _) in (mapper.orig_to_new_stacked if mapper else {}).items():
        found.setdefault(whole.strip("."), []).append(part.strip("."))
    return {whole: parts for whole, parts in found.items() if "." not in whole}


def _called(module: ast.Module) -> Iterator[tuple[str, str]]:
    """``self.mamba = Mixer(…, prefix=f"{prefix}.mixer")``: modules that it calls otherwise, without
    a word, where their quantization is asked for."""
    for node in ast.walk(module):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        target = node.targets[0]
        for given in node.value.keywords:
            if given.arg != "prefix" or not isinstance(given.value, ast.JoinedStr):
                continue
            last = ast.unparse(given.value.values[-1]).strip("'\"")
            name = last.rpartition(".")[2]
            if isinstance(target, ast.Attribute) and name.isidentifier() and name != target.attr:
                yield target.attr, name


def _renamed(cls: Any) -> list[tuple[str, str]]:
    """What it puts in place of the beginning of names, or of what is inside between dots."""
    mapper = getattr(cls, "hf_to_vllm_mapper", None)
    if mapper is None:
        return []
    inside = [pair for pair in mapper.orig_to_new_substr.items() if pair[0].startswith(".")]
    pairs = [*inside, *mapper.orig_to_new_prefix.items()]
    return [(old, new) for old, new in pairs if old.endswith(".") and new]


def _one(cls: Any, needs: str | None) -> dict[str, Any]:
    if ".transformers" in cls.__module__:
        return {"code": "transformers", "needs": needs, **_NOTHING}
    module = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    declared, stacked = _declared(cls, module), _stacked(cls)
    fused = {whole: list(parts) for whole, parts in (stacked | declared).items()}
    return {
        "code": "vllm",
        "needs": needs,
        "fused": {whole: parts for whole, parts in fused.items() if parts != [whole]},
        "undeclared": sorted(stacked.keys() - declared.keys()),
        "called": dict(sorted(_called(module))),
        "renamed": _renamed(cls),
    }


def _run_by_transformers() -> Iterator[str]:
    """Classes that vLLM has not and runs by transformers' code, of those that generate text."""
    import transformers
    from transformers.models.auto import modeling_auto

    for name in {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    }:
        cls: Any = getattr(transformers, name)
        if cls.is_backend_compatible() or cls._can_set_attn_implementation():
            yield name


def _missing(error: Exception) -> str:
    """The package that an import failed for; transformers says only what of its own did."""
    return getattr(error, "name", None) or "torchvision"


def _main() -> None:
    import vllm
    from vllm.model_executor.models import registry

    names = [
        *registry._TEXT_GENERATION_MODELS,
        *registry._MULTIMODAL_MODELS,
        *registry._TRANSFORMERS_SUPPORTED_MODELS,
    ]
    found: dict[str, Any] = {
        name: {"code": "transformers", "needs": None, **_NOTHING} for name in _run_by_transformers()
    }
    needs: dict[str, str | None] = {}
    for again in (False, True):
        if again:
            stand_in()
        for name in names if not again else list(needs):
            try:
                cls = registry.ModelRegistry.models[name].load_model_cls()
            except ImportError as error:
                needs.setdefault(name, _missing(error))
                print(f"{name}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
                continue
            found[name] = _one(cls, needs.get(name))
    lines = [f" {json.dumps(name)}: {json.dumps(one)}" for name, one in sorted(found.items())]
    head = f'{{"vllm": {json.dumps(vllm.__version__)}, "architectures": {{\n'
    Path(sys.argv[1]).write_text(head + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    _main()
