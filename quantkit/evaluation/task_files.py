"""What tasks read from local files, by content: another question is another result."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from quantkit.system.files import sha256_files

_NAME = re.compile(rb"[\w.-]+")


def digests(tasks: Sequence[str], data: Mapping[str, str]) -> dict[str, str]:
    """sha256 by path of the tasks' own YAML files, of what lies beside one and is named in it, and
    of all that ``data`` points to. What is absent is left out: reading it says so."""
    paths = {path for task in tasks for path in _of_task(Path(task))}
    for given in data.values():
        path = Path(given).expanduser()
        paths |= {path} if path.is_file() else {p for p in path.rglob("*") if p.is_file()}
    return {str(path): digest for path, digest in sorted(sha256_files(paths).items())}


def _of_task(path: Path) -> Iterator[Path]:
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return
    yield path
    named = {word.decode() for word in _NAME.findall(path.read_bytes())}
    # As `file.jsonl`, or as the module of `!function module.name`.
    modules = {f"{word.split('.')[0]}.py" for word in named}
    yield from (
        other
        for other in path.parent.iterdir()
        if other.name in named | modules and other.is_file() and other != path
    )
