"""Why llama.cpp's converter failed, in one line."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from quantkit.producers.gguf.converter_launcher import reason


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (
            "assert max([7]) < 5  # ids",
            "AssertionError at `assert max([7]) < 5` (script.py, line 2)",
        ),
        ("{}['rope_theta']", "KeyError: 'rope_theta' at `{}['rope_theta']` (script.py, line 2)"),
        ("raise ValueError('no such scaling\\nand more')", "no such scaling"),
        (  # the converter's own line, not that of a library which it calls
            "import collections; collections.ChainMap()['k']",
            "KeyError: 'k' at `import collections; "
            "collections.ChainMap()['k']` (script.py, line 2)",
        ),
    ],
)
def test_the_reason_is_one_line_that_says_what_and_where(
    code: str, line: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"# nothing\n{code}\n")
    with pytest.raises((AssertionError, KeyError, ValueError)) as caught:
        runpy.run_path(str(script))
    assert isinstance(caught.value, Exception)
    assert reason(caught.value, tmp_path) == line
