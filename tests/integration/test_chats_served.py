"""Chats on llama-server: rendered as transformers renders them, and ended where answers end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM

from quantkit.engines.llamacpp.scorer import LlamaScorer
from quantkit.evaluation.prompt_file import read_prompts
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.tokenizer import load_tokenizer
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert
from tests.chats import CHATS, TEMPLATES, TIME, WEATHER, WITH_TOOLS, as_openai
from tests.integration.servers import KEY, PATIENCE, Running, running
from tests.models import add_tokens, make_checkpoint

TRIMS_QUESTIONS = ("llama", "gemma", "gemma_3")
SPECIAL = {"unk_token": "<|endoftext|>", "pad_token": "<|im_end|>", "own_token": "<|im_start|>"}


def with_templates(source: Path, directory: Path, templates: dict[str, str]) -> Variant:
    shutil.copytree(source, directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | SPECIAL
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    for name, text in templates.items():
        file = directory / "additional_chat_templates" / f"{name}.jinja"
        if name == "default":
            file = directory / "chat_template.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return convert(Checkpoint.open(directory), Spec("gguf", "Q8_0"), None, directory / "out")


def ask(server: Running, route: str, **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{server.url}{route}", json=body, headers=headers, timeout=PATIENCE)


def as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What llama-server, and vLLM, make of contents where the template takes only text."""
    found = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
        found.append({**message, "content": content or ""})
    return found


def differences(
    server: Running, directory: Path, *, parts: bool = False
) -> dict[str, tuple[str, str]]:
    """Of each chat that llama-server does not render as transformers does, both texts.

    ``parts``: the template takes lists of them.
    """
    tokenizer = load_tokenizer(directory)
    found = {}
    for name, messages in CHATS.items():
        own = messages if parts and "parts" in name else as_text(messages)
        for tools in (None, [WEATHER, TIME])[: 1 + (name in WITH_TOOLS)]:
            try:
                expected = tokenizer.apply_chat_template(
                    own, tools=tools, tokenize=False, add_generation_prompt=True
                )
            except TemplateError as error:
                expected = f"refused: {error}"
            more = {"tools": tools} if tools else {}
            answer = ask(server, "/apply-template", messages=as_openai(messages), **more)
            got = answer.json().get("prompt")
            if answer.status_code == 400:
                got = f"refused: {answer.json()['error']['message'].rpartition('Exception: ')[2]}"
            if got != expected:
                found[f"{name}{' with tools' if tools else ''}"] = (expected, got)
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_rendered_as_by_transformers(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    variant = with_templates(tiny_llama, tmp_path / "m", {"default": TEMPLATES[name]})
    with running(variant, tmp_path / "log") as server:
        found = show(differences(server, variant.path, parts=name == "gemma_3"))
    # It trims the spaces of ASCII only.
    assert found.keys() == ({"unicode spaces at the end"} if name in TRIMS_QUESTIONS else set())


def show(found: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    for chat, (expected, got) in found.items():
        print(f"--- {chat}\n{expected!r}\n{got!r}")
    return found


def test_a_template_for_tools_is_taken_where_there_are_tools(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Also where llama-server is given a text of our own for both."""
    for number, plain in enumerate((TEMPLATES["chatml"], TEMPLATES["variables"])):
        templates = {"default": plain, "tool_use": TEMPLATES["qwen"], "rag": "never {{ asked }}"}
        variant = with_templates(tiny_llama, tmp_path / str(number), templates)
        with running(variant, tmp_path / "log") as server:
            assert show(differences(server, variant.path)) == {}


def test_a_template_for_tools_alone(tiny_llama: Path, tmp_path: Path) -> None:
    variant = with_templates(tiny_llama, tmp_path / "m", {"tool_use": TEMPLATES["qwen"]})
    with running(variant, tmp_path / "log") as server:
        question = CHATS["one question"]
        refused = ask(server, "/v1/chat/completions", messages=question, max_tokens=3)
        assert refused.status_code == 400
        assert "for requests with tools only" in refused.json()["error"]["message"]
        taken = ask(server, "/apply-template", messages=question, tools=[TIME])
    tokenizer = load_tokenizer(variant.path)
    assert taken.json()["prompt"] == tokenizer.apply_chat_template(
        question, tools=[TIME], tokenize=False, add_generation_prompt=True
    )


def test_a_model_without_a_template_refuses_chats(tiny_llama: Path, tmp_path: Path) -> None:
    variant = with_templates(tiny_llama, tmp_path / "m", {})
    with running(variant, tmp_path / "log") as server:
        for more in ({}, {"tools": [TIME]}, {"stream": True}):
            body = {"messages": CHATS["one question"], "max_tokens": 3, **more}
            refused = ask(server, "/v1/chat/completions", **body)
            assert refused.status_code == 400
            assert "this model has no chat template; use /v1/completions" in refused.text
        answered = ask(server, "/v1/completions", prompt="The list", max_tokens=3)
        assert answered.status_code == 200


def test_a_client_may_set_what_templates_read(tiny_llama: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("variables", "qwen")):
        variant = with_templates(tiny_llama, tmp_path / str(number), {"default": TEMPLATES[name]})
        tokenizer = load_tokenizer(variant.path)
        question = CHATS["system and turns"]
        with running(variant, tmp_path / "log") as server:
            for given in (
                {"enable_thinking": True},
                {"enable_thinking": False},
                {"date_string": "1 May", "clear_thinking": False},
            ):
                body = {"messages": question, "chat_template_kwargs": given}
                rendered = ask(server, "/apply-template", **body).json()["prompt"]
                assert rendered == tokenizer.apply_chat_template(
                    question, tokenize=False, add_generation_prompt=True, **given
                )


@pytest.mark.parametrize("others", [0, 3], ids=["in the file", "told to the server"])
def test_served_answers_end_where_measured_ones_do(tmp_path: Path, others: int) -> None:
    """At an end of generation_config.json that llama.cpp does not know by its text."""
    source = make_checkpoint(tmp_path / "model", tie_word_embeddings=False)
    question = "The import statement"
    ids = load_tokenizer(source)(question).input_ids
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        whole = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
    written = whole[0, len(ids) :].tolist()
    end = next(token for token in written[4:] if token not in (*ids, *written[:4]))
    unused = [token for token in range(900, 1000) if token not in (*ids, *written)][:others]
    ends = [*unused, end]
    add_tokens(source, {token: f"<{token}>" for token in ends})
    generation = {"eos_token_id": [2, *ends]}
    (source / "generation_config.json").write_text(json.dumps(generation))
    variant = convert(Checkpoint.open(source), Spec("gguf", "F32"), None, tmp_path / "out")
    tokenizer = load_tokenizer(variant.path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": question}))
    measured = read_prompts(prompts, tokenizer, variant.path, max_tokens=24, max_length=256)
    with LlamaScorer(variant, 256) as scorer:
        (answer,) = scorer.generate([measured.entries[0].ids], 24, measured.ended)
    assert answer == written[: written.index(end) + 1]
    with running(variant, tmp_path / "log") as server:
        body = {"prompt": question, "max_tokens": 24, "temperature": 0}
        (choice,) = ask(server, "/v1/completions", **body).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == tokenizer.decode(answer, skip_special_tokens=True)
