from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.formats.detect import open_model
from quantkit.gateway.chats import renders_chats
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert
from tests.models import make_checkpoint

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A checkpoint without a chat template."""
    path = make_checkpoint(tmp_path / "plain", num_hidden_layers=1)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    "file",
    [
        "chat_template.jinja",
        "additional_chat_templates/default.jinja",
        "tokenizer_config.json",
        "chat_template.json",
    ],
)
def test_a_template_in_any_of_its_files(plain: Path, file: str) -> None:
    assert not renders_chats(open_model(plain), {})
    (plain / file).parent.mkdir(exist_ok=True)
    content = json.dumps({"chat_template": TEMPLATE}) if file.endswith(".json") else TEMPLATE
    (plain / file).write_text(content)
    assert renders_chats(open_model(plain), {})


def test_a_gguf_has_it_inside(plain: Path, tiny_llama: Path, tmp_path: Path) -> None:
    def made(source: Path, name: str) -> Variant:
        return convert(Checkpoint.open(source), Spec("gguf", "Q8_0"), None, tmp_path / name)

    without = made(plain, "without")
    (without.path / "chat_template.jinja").write_text(TEMPLATE)  # which llama.cpp does not read
    assert not renders_chats(without, {})
    assert renders_chats(made(tiny_llama, "with"), {})


@pytest.mark.parametrize(
    ("arguments", "renders"),
    [
        ({"chat_template": "chatml"}, True),
        ({"chat-template-file": "x.jinja"}, True),
        ({"chat_template_kwargs": "{}", "jinja": True}, False),
    ],
)
def test_an_engine_can_be_given_one(plain: Path, arguments: dict[str, Any], renders: bool) -> None:
    assert renders_chats(open_model(plain), arguments) is renders
