"""The directory that vLLM is to load a model's tokenizer from.

vLLM asks ``AutoTokenizer``, which goes by the class that tokenizer_config.json names, or by the
model's, and puts that class's rules in place of those in tokenizer.json. A copy whose settings name
the class that takes the file as it is gives what was measured.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.models.chat_template import NAMED
from quantkit.system.files import new_directory
from quantkit.system.home import home
from quantkit.system.json_file import load_json

_SETTINGS = "tokenizer_config.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_AS_WRITTEN = {"tokenizer_class": "PreTrainedTokenizerFast"}
_NOT_IN_THE_FILE = (
    *("auto_map", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
    *("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens"),
    "fix_mistral_regex",
)
"""Settings by which transformers changes what it has read from tokenizer.json."""


def as_written(directory: Path) -> Path | None:
    """A copy of the tokenizer in ``directory`` with which ``AutoTokenizer`` gives tokenizer.json's
    ids; kept in quantkit's cache, by content. None where there is no tokenizer.json.

    Raise CheckpointError for settings that are not JSON.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        return None
    settings = _settings(directory)
    templates = [directory / name for name in _TEMPLATES if (directory / name).is_file()]
    templates += sorted((directory / NAMED).glob("*.jinja"))
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in (file, *templates):
        digest.update(str(path.relative_to(directory)).encode() + b"\0" + path.read_bytes())
    final = home() / "tokenizers" / digest.hexdigest()[:32]
    if final.is_dir():
        return final
    with suppress(QuantkitError), new_directory(final) as copy:  # another process may be first
        for path in (file, *templates):
            target = copy / path.relative_to(directory)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        (copy / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return final


def _settings(directory: Path) -> dict[str, object]:
    settings = load_json(directory / _SETTINGS)
    kept = {key: value for key, value in settings.items() if key not in _NOT_IN_THE_FILE}
    return kept | _AS_WRITTEN
