"""The tokenizer of a checkpoint, as its files have it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, first_line
from quantkit.models.chat_template import DEFAULT, chat_templates
from quantkit.system.json_file import load_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``directory``: tokenizer.json as it is, with the settings of
    tokenizer_config.json (the special tokens' names, the chat template) around it.

    The class that the settings name is not asked: those of transformers 5 put rules of their own
    in place of the file's, and checkpoints name wrong ones. transformers builds the tokenizer only
    where there is no tokenizer.json. Raise CheckpointError where it cannot be read.
    """
    file = directory / "tokenizer.json"
    load_json(directory / "tokenizer_config.json")  # damaged, it is named
    tokenizer = _as_written(file) if file.is_file() else load_auto_tokenizer(directory)
    if tokenizer.chat_template is None:  # transformers leaves chat_template.json to processors
        tokenizer.chat_template = chat_templates(directory).get(DEFAULT)
    return tokenizer


def _as_written(file: Path) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class Settings(PreTrainedTokenizerFast):  # type: ignore[misc]
        """All but the tokenizer itself: reading a large one and copying it takes seconds."""

        @classmethod
        def convert_to_native_format(cls, **settings: Any) -> dict[str, Any]:
            return {**settings, "tokenizer_object": Tokenizer(models.BPE())}

    try:
        tokenizer: PreTrainedTokenizerBase = Settings.from_pretrained(
            file.parent, local_files_only=True
        )
        # Only now: transformers adds tokens to what it has, and changes their flags.
        tokenizer._tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise CheckpointError(
            f"{file.parent}: unreadable tokenizer: {first_line(error)}"
        ) from error
    tokenizer.split_special_tokens = False
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        named = getattr(tokenizer, role)
        if named and tokenizer._tokenizer.token_to_id(named) is None:
            setattr(tokenizer, role, None)  # it would be given the id of another
    return tokenizer


def load_auto_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``directory`` as transformers, and vLLM with it, loads it: of the class that
    the settings name. Raise CheckpointError where transformers cannot read it."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        require_tokenizer(directory)
        raise CheckpointError(f"{directory}: unreadable tokenizer: {first_line(error)}") from error
    return tokenizer


def require_tokenizer(directory: Path) -> None:
    """Raise CheckpointError where there is none in ``directory``."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(
            f"{directory}: no tokenizer (tokenizer.json or tokenizer.model); copy it from where "
            "the model came from"
        )
