"""The user's own prompts: a file of JSON lines, read strictly and turned into token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.errors import RecipeError, did_you_mean
from quantkit.formats import format_of
from quantkit.models.end_tokens import end_ids
from quantkit.models.tokenizer import load_tokenizer
from quantkit.models.variant import Model, tokenizer_directory
from quantkit.system.files import sha256_json
from quantkit.system.packaged import packaged_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Message(_Entry):
    role: str = Field(min_length=1)
    content: str


class _Line(_Entry):
    prompt: str | None = Field(None, min_length=1)
    messages: list[_Message] | None = Field(None, min_length=1)
    category: str | None = Field(None, min_length=1)
    id: str | int | None = None


@dataclass(frozen=True)
class Prompt:
    """One prompt as every model reads it."""

    line: int
    """The line in the file, counted from 1."""
    id: str
    """The line's number where the file names none."""
    category: str | None
    text: str
    """What a person would call the prompt: of a chat the last message."""
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompts:
    """All prompts of a file, and how they are answered: greedily, up to ``max_tokens`` tokens or
    the first of ``ends``, ids that end an answer and belong to it.

    ``template_sha256``: of the chat template, None where no prompt needed it.
    """

    entries: tuple[Prompt, ...]
    ends: tuple[int, ...]
    max_tokens: int
    template_sha256: str | None = None

    @property
    def context(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return max(len(prompt.ids) for prompt in self.entries) + self.max_tokens

    def ended(self, answer: Sequence[int]) -> bool:
        """Whether an answer, of at least one token, ends with its last token."""
        return answer[-1] in self.ends

    @cached_property
    def sha256(self) -> str:
        """Digest of all prompts' ids."""
        return sha256_json([prompt.ids for prompt in self.entries])

    @cached_property
    def content_sha256(self) -> str:
        """Digest of everything that a result says of the prompts, names and categories too."""
        return sha256_json([[p.line, p.id, p.category, p.text, p.ids] for p in self.entries])

    def protocol(self) -> dict[str, Any]:
        """What two numbers must have in common to be compared."""
        return {
            "prompts": len(self.entries),
            "prompts_sha256": self.sha256,
            "chat_template_sha256": self.template_sha256,
            "decoding": "greedy",
            "max_answer_tokens": self.max_tokens,
            "end_ids": list(self.ends),
        }


def find_prompts(name: str) -> Path:
    """A path as given, or a file of prompts that quantkit ships, by its name."""
    path = Path(name).expanduser()
    shipped = packaged_directory("evals") / f"{name}.jsonl"
    return shipped if not path.suffix and not path.is_file() and shipped.is_file() else path


def read_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    max_tokens: int,
    max_length: int,
) -> Prompts:
    """Read ``{"prompt": …}`` or ``{"messages": [{"role": …, "content": …}]}`` from each line, with
    ``category`` and ``id`` where given; blank lines are skipped.

    ``directory``: where the tokenizer's files are; what ends an answer stands beside them.
    ``max_length``: tokens of prompt and answer that the model was made for. Raise RecipeError with
    file and line for what cannot be read, repeats an id, or is too long: nothing is left out.
    """
    entries = []
    lines_by_id: dict[str, int] = {}
    template = _template_sha256(tokenizer)
    chats = False
    for number, content in _lines(path):
        where = f"{path}:{number}"
        line = _parse(content, where)
        chats = chats or line.messages is not None
        id_ = str(number if line.id is None else line.id)
        if id_ in lines_by_id:
            raise RecipeError(f"{where}: id {id_!r} is that of line {lines_by_id[id_]} already")
        lines_by_id[id_] = number
        if line.messages is None:
            text = line.prompt or ""
            ids = tokenizer(text, verbose=False).input_ids
        else:
            text = line.messages[-1].content
            ids = _chat_ids(line.messages, tokenizer, directory, where)
        if not ids:
            raise RecipeError(f"{where}: the prompt has no tokens; there is nothing to answer")
        if len(ids) + max_tokens > max_length:
            raise RecipeError(
                f"{where}: {len(ids)} tokens and an answer of up to {max_tokens} are more than "
                f"the model's {max_length}; shorten the prompt or allow fewer answer tokens"
            )
        entries.append(Prompt(number, id_, line.category, text, tuple(ids)))
    if not entries:
        raise RecipeError(f'{path}: no prompts; expected lines such as {{"prompt": "…"}}')
    ends = tuple(sorted(end_ids(directory, tokenizer.eos_token_id)))
    return Prompts(tuple(entries), ends, max_tokens, template if chats else None)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers from 1 and bytes of the lines that are not blank."""
    if not path.is_file():
        raise RecipeError(f"prompts {path}: no such file; expected JSON lines")
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _parse(content: bytes, where: str) -> _Line:
    try:
        line = _Line.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"] if part not in ("str", "int"))
        if problem["type"] == "json_invalid":
            raise RecipeError(f"{where}: not JSON: {problem['ctx']['error']}") from error
        if problem["type"] == "extra_forbidden":
            known = list(_Line.model_fields if len(problem["loc"]) == 1 else _Message.model_fields)
            raise RecipeError(
                f"{where}: unknown key {key!r}; keys here are {', '.join(known)}"
                + did_you_mean(str(problem["loc"][-1]), known)
            ) from error
        raise RecipeError(f"{where}: {key + ': ' if key else ''}{problem['msg']}") from error
    if (line.prompt is None) == (line.messages is None):
        raise RecipeError(f"{where}: expected either prompt or messages")
    if line.messages and line.messages[-1].role == "assistant":
        raise RecipeError(f"{where}: the last message is the assistant's: nothing to answer")
    return line


def _chat_ids(
    messages: Sequence[_Message],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    where: str,
) -> list[int]:
    """The ids of a chat up to where the assistant's answer begins."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise RecipeError(
            f"{where}: messages need a chat template, which the tokenizer in {directory} does not "
            "have; give the whole text as prompt"
        )
    try:
        text = tokenizer.apply_chat_template(
            [message.model_dump() for message in messages],
            tokenize=False,
            add_generation_prompt=True,
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{where}: the chat template refuses the messages: {reason}") from error
    # A template writes the special tokens itself.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    return sha256_json(tokenizer.chat_template) if tokenizer.chat_template else None


def load_prompts(path: str | None, answer_tokens: int, model: Model) -> Prompts | None:
    """The prompts at ``path``, or those that come with quantkit under that name, in the tokens of
    ``model``; None where there is no ``path``."""
    if path is None:
        return None
    directory = tokenizer_directory(model)
    return read_prompts(
        find_prompts(path),
        load_tokenizer(directory),
        directory,
        max_tokens=answer_tokens,
        max_length=format_of(model).context_length(model),
    )
