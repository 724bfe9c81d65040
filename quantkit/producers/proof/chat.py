"""Whether a variant renders chats and ends answers as its source does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantkit.errors import ConversionError, first_line
from quantkit.formats import format_of
from quantkit.models.chat_template import (
    DEFAULT,
    check_syntax,
    render,
    token_names,
)
from quantkit.models.checkpoint import FORMAT, Checkpoint
from quantkit.models.end_tokens import end_ids
from quantkit.models.variant import Variant

if TYPE_CHECKING:
    from quantkit.engines.llamacpp.vocabulary import Vocabulary


@dataclass(frozen=True)
class ChatProof:
    """``compared``: templates and ends. ``notes``: what the format cannot express, a line each.
    ``override``: metadata that llama-server is to be started with, for ends of answers that the
    file has no keys for."""

    compared: int = 0
    notes: list[str] = field(default_factory=list)
    override: dict[str, int] = field(default_factory=dict)


def prove_chat(source: Checkpoint, variant: Variant) -> ChatProof:
    """Compare the templates, and ask llama.cpp at which tokens it ends answers.

    Raise ConversionError where the variant has another template than transformers renders for the
    source.
    """
    if source.format != FORMAT:
        return ChatProof()  # a GGUF made of a GGUF: there is nothing else to compare with
    templates = format_of(source).chat_templates(source)
    compared = len(templates) + len(end_ids(source.path))
    proof = ChatProof(compared, _prove_templates(templates, source, variant))
    if variant.format == "gguf":
        from quantkit.engines.llamacpp.vocabulary import Vocabulary

        with Vocabulary(variant.weights) as vocabulary:
            _prove_ends(source, vocabulary, proof)
            _prove_beginning(templates.get(DEFAULT), source, vocabulary, proof)
    return proof


def _prove_templates(templates: dict[str, str], source: Checkpoint, variant: Variant) -> list[str]:
    wanted, found = templates, format_of(variant).chat_templates(variant)
    if variant.format == "gguf":
        from quantkit.formats.gguf.chat import stored_name

        wanted = {stored_name(name): text for name, text in templates.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ConversionError(
                f"{variant.spec}: its chat template {name!r} is not the one that transformers "
                f"renders for {source.path}: a fault of the conversion, please report it"
            )
    notes = []
    for name, text in templates.items():
        try:
            check_syntax(text)
        except Exception as error:  # whatever jinja2's parser meets
            notes.append(f"the chat template {name!r} cannot be read: {first_line(error)}")
    return notes


def _prove_ends(source: Checkpoint, vocabulary: Vocabulary, proof: ChatProof) -> None:
    untold = [
        end for end in end_ids(source.path) if end < len(vocabulary) and not vocabulary.is_end(end)
    ]
    if not untold:
        return
    # llama.cpp ends an answer at these three tokens for fill-in-the-middle as well.
    roles = ["fim_pad", "fim_rep", "fim_sep"]
    if vocabulary.role("fim_pre") is not None:
        roles = roles[:1]  # the others are in prompts of that kind
    free = [role for role in roles if vocabulary.role(role) is None]
    for role, end in zip(free, untold, strict=False):
        proof.override[f"tokenizer.ggml.{role}_token_id"] = end
    told, lost = untold[: len(free)], untold[len(free) :]
    if told:
        proof.notes.append(
            f"answers end at {_names(vocabulary, told)} too, for which a GGUF has no key: "
            "llama-server ends there only if `quantkit serve` starts it"
        )
    if lost:
        proof.notes.append(
            f"answers end at {_names(vocabulary, lost)} too, which llama.cpp cannot be told: "
            "answers that it serves do not end there"
        )


def _prove_beginning(
    template: str | None, source: Checkpoint, vocabulary: Vocabulary, proof: ChatProof
) -> None:
    """llama.cpp puts BOS before a chat wherever it puts it before a text."""
    if template is None or not vocabulary.adds_bos:
        return
    bos = vocabulary.text(vocabulary.role("bos") or 0)
    try:
        chat = render(
            template,
            [{"role": "user", "content": "Hello"}],
            add_generation_prompt=True,
            **token_names(source.path),
        )
    except Exception:  # a template that does not take such a chat
        return
    if not chat.startswith(bos):
        proof.notes.append(
            f"llama.cpp begins chats with {bos}, as it begins texts; the chat template does not, "
            "and transformers and vLLM follow it"
        )


def _names(vocabulary: Vocabulary, tokens: list[int]) -> str:
    return ", ".join(f"{vocabulary.text(token)} ({token})" for token in tokens)
