from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from quantkit.errors import RecipeError
from quantkit.evaluation.prompt_file import Prompts, find_prompts, read_prompts
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "Name a \u2028 prime."}]


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Checkpoint:
    return Checkpoint.open(tiny_llama)


def read(source: Checkpoint, path: Path, *lines: object) -> Prompts:
    path.write_text(
        "\n".join(
            line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)
            for line in lines
        ),
        encoding="utf-8",
    )
    return read_prompts(path, source.tokenizer, source.path, max_tokens=8, max_length=64)


def test_prompts_and_chats_become_the_ids_that_transformers_gives(
    source: Checkpoint, tmp_path: Path
) -> None:
    found = read(
        source,
        tmp_path / "p.jsonl",
        {"prompt": "The for statement", "category": "python", "id": "a"},
        "",
        {"messages": CHAT, "category": "numbers"},
        {"prompt": "def f(x):\n    return", "id": 7},
        "",
    )
    plain, chat, code = found.entries
    assert list(plain.ids) == source.tokenizer("The for statement").input_ids
    assert (plain.line, plain.id, plain.category, plain.text) == (
        1, "a", "python", "The for statement",
    )  # fmt: skip
    wanted = source.tokenizer.apply_chat_template(
        CHAT, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert list(chat.ids) == wanted
    assert (chat.line, chat.id, chat.category, chat.text) == (3, "3", "numbers", CHAT[0]["content"])
    assert (code.line, code.id, code.category) == (4, "7", None)
    assert found.context == max(len(one.ids) for one in found.entries) + 8
    assert found.template_sha256 is not None
    template = json.dumps(source.tokenizer.chat_template, ensure_ascii=True)
    assert found.template_sha256 == hashlib.sha256(template.encode()).hexdigest()
    assert read(source, tmp_path / "q.jsonl", {"prompt": "x"}).template_sha256 is None


def test_what_ends_an_answer_is_in_the_files_beside_the_tokenizer(
    source: Checkpoint, tmp_path: Path
) -> None:
    assert source.tokenizer.eos_token_id == 2
    copy = tmp_path / "copy"
    shutil.copytree(source.path, copy)
    (copy / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    (copy / "config.json").write_text('{"eos_token_id": 9}')
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}')
    found = read_prompts(
        tmp_path / "p.jsonl", load_tokenizer(copy), copy, max_tokens=8, max_length=64
    )
    assert found.ends == (0, 2, 5, 9)
    assert found.ended([1, 5])
    assert not found.ended([5, 1])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("prompt", "not JSON"),
        ('["a"]', "Input should be an object"),
        ("{}", "expected either prompt or messages"),
        ({"prompt": "a", "messages": CHAT}, "expected either prompt or messages"),
        ({"prompt": 3}, "prompt: Input should be a valid string"),
        ({"prompt": ""}, "prompt: String should have at least 1 character"),
        ({"prompt": "a", "catgory": "b"}, "unknown key 'catgory'.*did you mean 'category'"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "2"}]}, "nothing to answer"),
        ({"prompt": "b", "id": "first"}, "id 'first' is that of line 1 already"),
        ({"prompt": "a b " * 40}, r"\d+ tokens and an answer of up to 8 are more than .* 64"),
        ('{"prompt": "\\ud800"}', "not JSON"),
        ("[" * 5000, "not JSON: recursion limit exceeded"),
    ],
)
def test_a_bad_line_is_named(
    source: Checkpoint, tmp_path: Path, line: object, problem: str
) -> None:
    path = tmp_path / "p.jsonl"
    good = {"prompt": "fine", "id": "first"}
    with pytest.raises(RecipeError, match=f"^{path}:3: .*{problem}") as caught:
        read(source, path, good, "", line)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "\xff"}\n')
    with pytest.raises(RecipeError, match=r"p\.jsonl:2: not JSON"):
        read_prompts(path, source.tokenizer, source.path, max_tokens=8, max_length=64)
    path.write_bytes(b" \n\n")
    with pytest.raises(RecipeError, match="no prompts; expected lines such as"):
        read_prompts(path, source.tokenizer, source.path, max_tokens=8, max_length=64)
    with pytest.raises(RecipeError, match="nowhere: no such file"):
        read_prompts(Path("nowhere"), source.tokenizer, source.path, max_tokens=8, max_length=64)


def test_chats_need_a_template_that_takes_them(source: Checkpoint, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(source.path)
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match=r"p\.jsonl:1: messages need a chat template"):
        read_prompts(path, tokenizer, source.path, max_tokens=8, max_length=64)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        RecipeError, match=r"p\.jsonl:1: the chat template refuses .*must alternate"
    ):
        read_prompts(path, tokenizer, source.path, max_tokens=8, max_length=64)


def test_the_example_of_the_documentation_is_read(source: Checkpoint, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "measuring.md").read_text(encoding="utf-8")
    example = text.split("## Your own prompts")[1].split("```\n")[1]
    found = read(source, tmp_path / "p.jsonl", *example.splitlines())
    assert [one.category for one in found.entries] == [None, "support"]


def test_prompts_that_come_along_are_found_by_their_name(tiny_llama: Path, tmp_path: Path) -> None:
    """Two dozen of several kinds, which every model reads: none of them needs a chat template."""
    found = read_prompts(
        find_prompts("everyday"),
        Checkpoint.open(tiny_llama).tokenizer,
        tiny_llama,
        max_tokens=8,
        max_length=2048,
    )
    assert len(found.entries) == len({one.text for one in found.entries}) == 24
    assert set(Counter(one.category for one in found.entries).values()) == {4}
    assert found.template_sha256 is None
    own = tmp_path / "everyday"
    own.write_text("{}")
    assert find_prompts(str(own)) == own
    assert find_prompts("no_such") == Path("no_such")
