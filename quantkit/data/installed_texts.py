"""Calibration texts of several kinds that need no network.

Each is put together when it is asked for, from what quantkit's dependencies carry under free
licences and from ``corpus/``, which was written for this. MMLU's questions are left out
in every language, though lm-eval carries them: they are asked when variants are measured.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from quantkit.data.python_texts import evaluated
from quantkit.data.standard_library import stdlib_modules
from quantkit.data.text import Conversation, MissingText, Text, of_conversations, paragraphs, said
from quantkit.data.text_file import read_text_file

_WRITTEN = Path(__file__).with_name("corpus")
"""The directory of what was written for quantkit."""
_CHARACTERS = 16_000
"""Characters taken from one package's description at most, so that none makes up most of the
text."""
_LONGEST = 500_000
"""Characters of a text; many times what a quantizer looks at."""
_SHORTEST = 300
"""Characters below which a docstring is a label, not a text."""
_DESCRIBED = (
    "aiohttp", "click", "datasets", "evaluate", "faker", "fsspec", "gguf", "guidellm", "httpx",
    "huggingface-hub", "jinja2", "llama-cpp-python", "lm-eval", "loguru", "more-itertools",
    "networkx", "nltk", "numpy", "pandas", "psutil", "pydantic", "requests", "rich", "sacrebleu",
    "safetensors", "sanic", "scikit-learn", "scipy", "sympy", "tabulate", "tokenizers", "torch",
    "tqdm", "transformers", "urllib3", "uvloop", "yarl",
)  # fmt: skip
_MATHEMATICAL = (
    ("mpmath", "function_docs.py"),
    ("sympy", "calculus"), ("sympy", "ntheory"), ("sympy", "series"), ("sympy", "stats"),
)  # fmt: skip
_REASONED = ("bbh/cot_fewshot", "gsm8k/gsm8k-cot.yaml")
"""Those of lm-eval's tasks whose examples are questions with reasoned answers."""

T = TypeVar("T")


def web() -> Text:
    """Packages' descriptions: English Markdown, as on the web."""
    found = {}
    for name in _DESCRIBED:
        try:
            body = metadata.metadata(name).json.get("description")
        except metadata.PackageNotFoundError:
            continue
        if isinstance(body, str) and body.strip():
            found[name] = body[:_CHARACTERS].strip()
    if not found:
        raise MissingText("text 'packages:web': no installed package has a description")
    return Text("packages:web", _versions(found), _joined(found.values()))


def mathematics() -> Text:
    """What mpmath and sympy document: definitions, formulas and worked examples."""
    documented = [
        text
        for package, inside in _MATHEMATICAL
        for file in _modules(_package(package) / inside)
        for text in _docstrings(file)
    ]
    return Text(
        "packages:math",
        _versions(("mpmath", "sympy")),
        _joined(documented),
    )


def chats() -> Text:
    """Conversations written for this, lm-eval's reasoned answers, and questions about Python."""
    conversations = [
        *read_text_file(_WRITTEN / "chat.jsonl").conversations,
        *(_exchange(asked, answered) for asked, answered in _examples()),
        *_about_python(),
    ]
    kept = [chat for chat in _spread(conversations, said) if _is_apart(said(chat))]
    return of_conversations(Text("packages:chat", _versions(("quantkit", "lm-eval")), ""), kept)


def prose() -> Text:
    """English of many sorts, written for this: stories, news, letters, science."""
    return _written("prose")


def languages() -> Text:
    """The same in German, Arabic, Chinese and eighteen other languages."""
    return _written("languages")


def _written(name: str) -> Text:
    text = read_text_file(_WRITTEN / f"{name}.txt")
    return replace(text, dataset=f"packages:{name}")


def _examples() -> Iterator[tuple[str, str]]:
    """What lm-eval shows before a task's questions: questions and their answers."""
    import yaml

    class Loader(yaml.SafeLoader):
        """``!function`` names code, which is not needed here."""

    Loader.add_constructor("!function", lambda *_: None)
    for place in _REASONED:
        for file in _modules(_package("lm_eval") / "tasks" / place, ".yaml"):
            content = yaml.load(file.read_text(encoding="utf-8"), Loader)
            for example in content.get("fewshot_config", {}).get("samples") or ():
                asked = example.get("question") or example.get("input")
                if asked and example.get("target"):
                    yield asked, example["target"]


def _about_python() -> Iterator[Conversation]:
    """What functions and classes of the standard library do, in the words of their docstrings."""
    for name, file in stdlib_modules(calibration=True).items():
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if module.startswith("_") or "._" in module:
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            text = ast.get_docstring(node)
            if text and _SHORTEST <= len(text) <= 2000:
                yield _exchange(f"What does `{module}.{node.name}` do in Python?", text)


@cache
def _evaluated() -> set[str]:
    """The paragraphs of the texts to evaluate on that come from the same places."""
    return {line for text in evaluated() for line in paragraphs(text.text)}


def _joined(documents: Iterable[str]) -> str:
    """One text of those that share no paragraph with a text to evaluate on."""
    return "\n\n".join(_spread(text for text in documents if _is_apart(text)))[:_LONGEST]


def _is_apart(text: str) -> bool:
    return paragraphs(text).isdisjoint(_evaluated())


def _exchange(asked: str, answered: str) -> Conversation:
    return (
        {"role": "user", "content": asked.strip()},
        {"role": "assistant", "content": answered.strip()},
    )


def _docstrings(file: Path) -> Iterator[str]:
    """The long ones, and other long strings that stand in a module for its readers."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value.strip()
            if len(text) >= _SHORTEST:
                yield text


def _modules(place: Path, suffix: str = ".py") -> list[Path]:
    """A file, or those of a directory without its tests; raise MissingText where there is none."""
    found = [place] if place.is_file() else sorted(place.rglob(f"*{suffix}"))
    found = [file for file in found if "tests" not in file.relative_to(place).parts]
    if not found:
        raise MissingText(f"{place}: not there, or without any *{suffix}")
    return found


def _package(name: str) -> Path:
    """Where a package is installed; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingText(f"the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])


def _versions(packages: Iterable[str]) -> str:
    """Name and version of each of these packages that is installed."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(name)
    return ", ".join(found)


def _spread(items: Iterable[T], key: Callable[[T], str] = str) -> list[T]:
    """In an order that looks random and is always the same: by the sha256 of their text."""
    return sorted(items, key=lambda item: hashlib.sha256(key(item).encode()).digest())
