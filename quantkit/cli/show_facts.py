"""What `inspect` found, as a page that one can read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from quantkit.cli.console import print_json, printable
from quantkit.reports.format import count, number, size

_LISTED = 10
"""Longer lists are cut, unless all is asked for."""

Lines = Mapping[str, str | None]
"""A label and its text; None where there is nothing to show."""


def facts(found: Mapping[str, Any], *, as_json: bool, everything: bool) -> None:
    """Sizes, schemes, origin and oddities; ``everything``: each fact as well, in full."""
    if as_json:
        print_json(found)
        return
    manifest = found.get("manifest") or {}
    scheme = found.get("dtype") or f"{found['format']}:{found['scheme']}"
    click.echo(f"{scheme}, {found['kind']}")
    _section("Model", _model(found, manifest))
    _section("Weights", _weights(found, manifest))
    _section("Tokenizer", _tokenizer(found))
    _section("Origin", _origin(found, manifest))
    if "oddities" in found:
        _list("Oddities", found["oddities"] or ["none"], everything)
    _list("Notes", [*found.get("notes", []), *manifest.get("notes", [])], everything)
    if everything:
        click.echo("\nEverything")
        click.echo("\n".join(_tree(found, "  ")))
    else:
        click.echo("\n--all prints the rest: hashes, lists and settings.")


def _model(found: Mapping[str, Any], manifest: Mapping[str, Any]) -> Lines:
    parameters = found.get("parameters") or manifest.get("parameters")
    context = found.get("context_length")
    return {
        "name": found.get("name"),
        "architecture": found.get("architecture"),
        "parameters": count(parameters) if parameters else None,
        "context": f"{context:,} tokens" if isinstance(context, int) else None,
    }


def _weights(found: Mapping[str, Any], manifest: Mapping[str, Any]) -> Lines:
    parts = len(found.get("parts", [])) or found.get("shards", 1)
    whole = found.get("bits_per_weight") or manifest.get("bits_per_weight")
    quantized = manifest.get("bits_per_weight_quantized")
    said = number(whole) if whole else None
    if said and quantized:
        said += f"; {number(quantized)} in the quantized layers"
    types = found.get("tensor_types", {})
    return {
        "size": f"{size(found['bytes'])} in {_tensors(found['tensors'])}"
        + (f", {parts} files" if parts > 1 else ""),
        "bits per weight": said,
        "types": "; ".join(
            f"{name} {size(one['bytes'])} in {_tensors(one['tensors'])}"
            for name, one in sorted(types.items(), key=lambda pair: -pair[1]["bytes"])
        )
        or None,
        "quantized": f"{found['quantized_linears']:,} linear layers"
        if "quantized_linears" in found
        else None,
        "settings": _plain(found.get("quantization_config", {})),
    }


def _tensors(n: int) -> str:
    return f"{n:,} tensor{'s' * (n != 1)}"


def _tokenizer(found: Mapping[str, Any]) -> Lines:
    if "tokenizer" not in found:
        return {}
    special = found["special_tokens"].items()
    return {
        "kind": f"{found['tokenizer']}, pre-tokenizer {found['pre_tokenizer']}",
        "vocabulary": f"{found['vocabulary']:,} tokens",
        "special tokens": ", ".join(f"{role} {one['token']}" for role, one in special) or None,
        "chat template": "yes" if found["chat_template"] else "no",
    }


def _origin(found: Mapping[str, Any], manifest: Mapping[str, Any]) -> Lines:
    matrix = found.get("imatrix") or {}
    told: dict[str, str | None] = {
        "source": found.get("origin"),
        "importance matrix": _plain(matrix),
    }
    if not manifest:
        return told
    source, cost, text = manifest["source"], manifest["convert"], manifest["calibration"]
    tools = ", ".join(f"{name} {version}" for name, version in manifest["tools"].items())
    return {
        **told,
        "source": source["id"] + (f"@{source['revision']}" if source["revision"] else ""),
        "made": f"{manifest['created_at']} in {cost['seconds']:.0f} s, "
        f"at most {size(cost['peak_rss_bytes'])} of memory",
        "made by": f"{manifest['spec']['producer']}: {tools}",
        "calibration": text
        and f"{text['dataset']}: {text['samples']} windows of {text['sequence_length']} tokens, "
        f"seed {text['seed']}",
        "proved": "; ".join(
            f"{what}: {one['compared']:,} compared, {len(one['differences']) or 'none'} different"
            for what, one in manifest["proof"].items()
        )
        or None,
    }


def _section(title: str, lines: Lines) -> None:
    said = {label: text for label, text in lines.items() if text}
    if said:
        click.echo(f"\n{title}")
        for label, text in said.items():
            click.echo(f"  {label:17}  {printable(text)}")


def _list(title: str, lines: Sequence[str], everything: bool) -> None:
    if not lines:
        return
    click.echo(f"\n{title}")
    shown = lines if everything else lines[:_LISTED]
    for line in shown:
        click.echo(f"  {printable(line)}")
    if len(shown) < len(lines):
        click.echo(f"  … {len(lines) - len(shown)} more")


def _plain(settings: Mapping[str, Any]) -> str | None:
    """``bits 4, group_size 64``: what is no list and no section of its own."""
    return (
        ", ".join(
            f"{key} {value}"
            for key, value in settings.items()
            if isinstance(value, str | int | float)
        )
        or None
    )


def _tree(value: Any, indent: str) -> Iterator[str]:
    """Each key and value on a line of its own, sections indented."""
    named = isinstance(value, Mapping)
    pairs = value.items() if named else (("-", one) for one in value)
    for key, part in pairs:
        label = f"{indent}{printable(str(key))}" + (":" if named else "")
        if isinstance(part, Mapping | list) and part:
            yield label
            yield from _tree(part, indent + "  ")
        else:
            yield f"{label} {'none' if part is None or part in ([], {}) else printable(str(part))}"
