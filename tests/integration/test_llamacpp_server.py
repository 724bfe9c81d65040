from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest

from quantkit.errors import EngineError
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert
from tests.integration.servers import KEY, Running, running, tree, wait_until_gone


@pytest.fixture(scope="module")
def variant(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    out = tmp_path_factory.mktemp("variants")
    return convert(Checkpoint.open(tiny_llama), Spec("gguf", "Q8_0"), None, out)


@pytest.fixture(scope="module")
def server(variant: Variant, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(variant, tmp_path_factory.mktemp("logs") / "llama.log") as found:
        yield found


def test_offers_the_model_by_name(server: Running) -> None:
    assert [model.id for model in server.client().models.list()] == ["m"]


def test_streams_to_several_at_once(server: Running) -> None:
    """The fault that rules out llama-cpp-python's own server: a second request ends the first."""

    def ask(number: int) -> int:
        stream = server.client().completions.create(
            model="m",
            prompt=f"{number} the list of objects",
            max_tokens=40,
            stream=True,
            extra_body={"ignore_eos": True},
            stream_options={"include_usage": True},
        )
        *_, last = stream
        assert last.usage is not None
        return last.usage.completion_tokens

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(8))) == [40] * 8


def test_demands_its_key_and_does_not_show_it(server: Running) -> None:
    with pytest.raises(openai.AuthenticationError):
        server.client("another").completions.create(model="m", prompt="x", max_tokens=1)
    for process in tree(server.process.supervisor.pid):
        assert KEY not in " ".join(process.cmdline())


@pytest.mark.parametrize("shared", [False, True])
def test_prompts_share_work_only_where_they_may(
    variant: Variant, tmp_path: Path, shared: bool
) -> None:
    prompt = "the same words again and again in one long sentence " * 4
    with running(variant, tmp_path / "log", prefix_cache=shared) as server:
        for _ in range(2):
            answer = server.client().completions.create(model="m", prompt=prompt, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    cached = answer.usage.prompt_tokens_details.cached_tokens or 0
    assert (cached > 0) == shared


def test_nothing_is_left_when_quantkit_is_killed(variant: Variant, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from quantkit.formats.detect import open_variant\n"
        "from tests.integration.servers import running\n"
        "with running(open_variant(Path(sys.argv[1])), Path(sys.argv[2])) as server:\n"
        "    print(server.process.supervisor.pid, flush=True); server.process.wait()\n"
    )
    argv = [sys.executable, "-c", script, str(variant.path), str(tmp_path / "log")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        family = tree(int(owner.stdout.readline()))
        assert any("llama-server" in " ".join(p.cmdline()) for p in family)
        owner.send_signal(signal.SIGKILL)
    wait_until_gone(family)


def test_damaged_file_is_told_in_one_line(variant: Variant, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(variant.weights.read_bytes()[:100_000])
    broken = Variant("damaged", damaged, "gguf", "Q8_0", None, (damaged,))
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with pytest.raises(EngineError) as caught, running(broken, tmp_path / "log"):
        pass
    message = str(caught.value)
    assert "before it was ready" in message
    assert "damaged.gguf" in message
    assert "\n" not in message
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before
