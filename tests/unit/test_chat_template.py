"""Which chat template counts, and that a variant has it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from transformers.utils.chat_template_utils import render_jinja_template

from quantkit.errors import CheckpointError, ConversionError
from quantkit.formats import format_of
from quantkit.formats.detect import open_variant
from quantkit.models import hub
from quantkit.models.chat_template import (
    chat_templates,
    render,
    renders_chats,
    token_names,
)
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.end_tokens import end_ids
from quantkit.models.spec import Spec
from quantkit.models.tokenizer import load_tokenizer
from quantkit.models.variant import verify
from quantkit.producers.convert import convert
from quantkit.producers.gguf import checkpoint_content
from tests.chats import CHATS, TEMPLATES, TIME, WEATHER, WITH_TOOLS

OLD, NEW, TOOLS, RAG = "old {{ messages }}", "new {{ messages }}", "tools", "rag\r\n"


def write(directory: Path, files: dict[str, Any]) -> Path:
    """``tokenizer_config.json`` gets what is given under that name as its chat template."""
    for name, value in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        if path.name == "tokenizer_config.json":
            value = json.dumps(json.loads(path.read_text()) | {"chat_template": value})
        path.write_bytes(value.encode())
    return directory


def bare(source: Path, directory: Path) -> Path:
    """A copy that has no chat template."""
    shutil.copytree(source, directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "none": ({}, {}),
    "null": ({"tokenizer_config.json": None}, {}),
    "in the settings": ({"tokenizer_config.json": OLD}, {"default": OLD}),
    "several in the settings": (
        {"tokenizer_config.json": [{"name": n, "template": n} for n in ("default", "tool_use")]},
        {"default": "default", "tool_use": "tool_use"},
    ),
    "a file": ({"chat_template.jinja": NEW}, {"default": NEW}),
    "a file and an older one": (
        {"chat_template.jinja": NEW, "tokenizer_config.json": OLD},
        {"default": NEW},
    ),
    "a file, and the settings say none": (
        {"chat_template.jinja": NEW, "tokenizer_config.json": None},
        {"default": NEW},
    ),
    "named ones": (
        {
            "chat_template.jinja": NEW,
            "tokenizer_config.json": [{"name": "older", "template": OLD}],
            "additional_chat_templates/tool_use.jinja": TOOLS,
            "additional_chat_templates/rag.v1.jinja": RAG,
            "additional_chat_templates/README.md": "no template",
        },
        {"default": NEW, "tool_use": TOOLS, "rag.v1": "rag\n"},
    ),
    "only named ones": (
        {"tokenizer_config.json": OLD, "additional_chat_templates/tool_use.jinja": TOOLS},
        {"tool_use": TOOLS},
    ),
    "a default twice": (
        {"chat_template.jinja": OLD, "additional_chat_templates/default.jinja": NEW},
        {"default": NEW},
    ),
    "empty": ({"chat_template.jinja": "", "tokenizer_config.json": OLD}, {"default": ""}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_templates_are_those_of_transformers(tiny_llama: Path, tmp_path: Path, layout: str) -> None:
    files, expected = LAYOUTS[layout]
    directory = write(bare(tiny_llama, tmp_path / "model"), files)
    theirs = load_tokenizer(directory).chat_template
    theirs = {} if theirs is None else {"default": theirs} if isinstance(theirs, str) else theirs
    assert chat_templates(directory) == theirs == expected


def test_a_processors_template_counts_where_there_is_no_other(
    tiny_llama: Path, tmp_path: Path
) -> None:
    directory = bare(tiny_llama, tmp_path / "model")
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": OLD}))
    assert chat_templates(directory) == {"default": OLD}
    assert load_tokenizer(directory).chat_template == OLD
    write(directory, {"tokenizer_config.json": NEW})
    assert chat_templates(directory) == {"default": NEW}
    assert load_tokenizer(directory).chat_template == NEW


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("chat_template.jinja", b"\xff", "not UTF-8"),
        ("chat_template.json", b"{", "not JSON"),
        ("chat_template.json", b'{"chat_template": 3}', "expected a text, or a list"),
        ("chat_template.json", b'{"chat_template": [{"name": "a"}]}', "expected a text, or a"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=f"{name}: .*{problem}"):
        chat_templates(tmp_path)


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_is_that_of_transformers(tiny_llama: Path, name: str) -> None:
    template, names = TEMPLATES[name], token_names(tiny_llama)
    assert names.items() >= load_tokenizer(tiny_llama).special_tokens_map.items()
    for chat, messages in CHATS.items():
        for tools in (None, [WEATHER, TIME])[: 1 + (chat in WITH_TOOLS)]:
            for more in ({}, {"add_generation_prompt": True}):
                given = {"tools": tools, **names, **more}
                expected = outcome(theirs, template, messages, given)
                assert outcome(ours, template, messages, given) == expected


def ours(template: str, messages: list[dict[str, Any]], given: dict[str, Any]) -> str:
    return render(template, messages, **given)


def theirs(template: str, messages: list[dict[str, Any]], given: dict[str, Any]) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=template, **given)
    return str(rendered[0])


def outcome(call: Callable[..., str], *arguments: Any) -> tuple[str, str]:
    try:
        return "text", call(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)


def test_marks_of_what_the_assistant_says_are_read() -> None:
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert render(text, [{"role": "assistant", "content": "a"}]) == "a"


def test_a_gguf_has_the_template_that_counts_and_the_named_ones(
    tiny_llama: Path, tmp_path: Path
) -> None:
    files, expected = LAYOUTS["named ones"]
    source = Checkpoint.open(write(bare(tiny_llama, tmp_path / "model"), files))
    variant = convert(source, Spec("gguf", "Q8_0"), None, tmp_path / "out")
    found = format_of(variant).chat_templates(variant)
    assert found == {name.replace(".", "_"): text for name, text in expected.items()}
    assert renders_chats(format_of(variant).chat_templates(variant))


@pytest.mark.parametrize("format", ["gguf", "gptq"])
def test_every_template_is_copied_hashed_and_verified(
    tiny_llama: Path, tmp_path: Path, format: str
) -> None:
    files, expected = LAYOUTS["named ones"]
    source = Checkpoint.open(write(bare(tiny_llama, tmp_path / "model"), files))
    (source.path / "generation_config.json").write_text('{"eos_token_id": [2, 1000]}')
    named = {f"additional_chat_templates/{name}.jinja" for name in ("tool_use", "rag.v1")}
    assert source.sha256.keys() >= named
    variant = made(source, format, tmp_path / "out")
    assert variant.manifest is not None
    assert variant.manifest.files.keys() >= named | {"chat_template.jinja"}
    assert "additional_chat_templates/README.md" not in variant.manifest.files
    for name in named:
        assert (variant.path / name).read_bytes() == (source.path / name).read_bytes()
    assert verify(variant) == []
    assert chat_templates(variant.path) == expected
    assert end_ids(variant.path) == end_ids(source.path) == (2, 1000)
    assert load_tokenizer(variant.path).chat_template == expected
    (variant.path / "additional_chat_templates" / "tool_use.jinja").write_text("another")
    (variant.path / "additional_chat_templates" / "rag.v1.jinja").unlink()
    problems = verify(open_variant(variant.path))
    assert [problem.partition(":")[0] for problem in problems] == [
        "additional_chat_templates/rag.v1.jinja",
        "additional_chat_templates/tool_use.jinja",
    ]


def made(source: Checkpoint, format: str, out: Path) -> Any:
    from quantkit.data.calibration import calibrate
    from quantkit.data.texts import load_text

    if format == "gguf":
        return convert(source, Spec("gguf", "Q8_0"), None, out)
    text = load_text("pydoc:calibration")
    calibration = calibrate(text, source.tokenizer, samples=2, sequence_length=32, seed=0)
    return convert(source, Spec("gptq", "w4g64"), calibration, out)


def test_the_hub_is_asked_for_all_templates() -> None:
    files = ["chat_template.jinja", "additional_chat_templates/rag.jinja", "a/b.bin", "README.md"]
    assert list(filter_repo_objects(files, allow_patterns=list(hub._WANTED))) == files[:2]


def test_the_proof_finds_another_template(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the conversion took the older template of two."""
    files = {"chat_template.jinja": NEW, "tokenizer_config.json": OLD}
    source = Checkpoint.open(write(bare(tiny_llama, tmp_path / "model"), files))
    monkeypatch.setattr(checkpoint_content, "chat_templates", lambda directory: {"default": OLD})
    with pytest.raises(ConversionError, match="chat template 'default' is not the one that trans"):
        convert(source, Spec("gguf", "Q8_0"), None, tmp_path / "out")
    assert not (tmp_path / "out" / "gguf-Q8_0").exists()


def test_a_template_that_cannot_be_read_is_noted(tiny_llama: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(
        write(bare(tiny_llama, tmp_path / "model"), {"chat_template.jinja": "{% if %}"})
    )
    manifest = convert(source, Spec("gguf", "Q8_0"), None, tmp_path / "out").manifest
    assert manifest is not None
    (note,) = manifest.notes
    assert note.startswith("the chat template 'default' cannot be read: Expected an expression")


def test_names_that_a_gguf_would_confuse_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    files = {f"additional_chat_templates/{name}.jinja": name for name in ("a.b", "a-b")}
    source = Checkpoint.open(write(bare(tiny_llama, tmp_path / "model"), files))
    with pytest.raises(ConversionError, match=r"chat templates a-b, a\.b: two have the same name"):
        convert(source, Spec("gguf", "Q8_0"), None, tmp_path / "out")


@pytest.mark.parametrize(("layout", "has"), [("none", False), ("null", False), ("a file", True)])
def test_whether_a_model_can_be_asked_by_messages(
    tiny_llama: Path, tmp_path: Path, layout: str, has: bool
) -> None:
    directory = write(bare(tiny_llama, tmp_path / "model"), LAYOUTS[layout][0])
    source = Checkpoint.open(directory)
    variant = convert(source, Spec("gguf", "Q8_0"), None, tmp_path / "out")
    assert renders_chats(format_of(source).chat_templates(source)) == has
    assert renders_chats(format_of(variant).chat_templates(variant)) == has
    bare_file = open_variant(variant.weights.rename(tmp_path / "bare.gguf"))
    assert renders_chats(format_of(bare_file).chat_templates(bare_file)) == has
