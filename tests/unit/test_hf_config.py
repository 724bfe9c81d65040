"""Reading a configuration leaves transformers' models alone, and usable afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoConfig

from quantkit.models.hf_config import setting
from tests.models import make_checkpoint

SCRIPT = """
import json, sys
from pathlib import Path
from quantkit.models.hf_config import read_config
config = read_config(Path(sys.argv[1]))
assert "transformers.models.auto.modeling_auto" not in sys.modules
assert "transformers.generation.utils" not in sys.modules
from transformers import AutoModelForCausalLM
assert AutoModelForCausalLM.from_config(config).num_parameters()
print(json.dumps(config.to_dict(), default=str))
"""


def test_the_configuration_is_that_of_transformers(tiny_qwen2: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tiny_qwen2], capture_output=True, text=True, check=True
    )
    expected = AutoConfig.from_pretrained(tiny_qwen2).to_dict()
    assert json.loads(done.stdout) == json.loads(json.dumps(expected, default=str))


SETTING = """
import sys
from pathlib import Path
from quantkit.models.hf_config import setting
print(setting(Path(sys.argv[1]), "max_position_embeddings"), "transformers" in sys.modules)
"""


def test_a_setting_that_the_file_names_needs_no_transformers(
    tiny_qwen2: Path, tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "gpt2", family="gpt2")
    assert "n_positions" in json.loads((other / "config.json").read_text())
    for path, expected in ((tiny_qwen2, "2048 False"), (other, "2048 True")):
        argv = [sys.executable, "-c", SETTING, path]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
    assert setting(tiny_qwen2, "no_such_setting") is None
