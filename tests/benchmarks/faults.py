"""What clients see when something breaks, and how long until they are served again.

    python -m tests.benchmarks.faults [--repeat 3] [--vllm]     # 2 minutes, 2 more with vLLM

Each fault is caused on a gateway of its own before real engines, while one client reads a stream
and another one asks again and again from the moment of the fault until it is answered: what the
two see, and the seconds in between, as median and range of the repetitions.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from quantkit.system.home import home
from tests.integration.faulty import STARVED, llama_server
from tests.integration.gateways import CONTEXT, Running, Stream, gateway
from tests.integration.servers import tree, wait_until_gone
from tests.models import make_checkpoint


@dataclass(frozen=True)
class Seen:
    """What one fault did."""

    running: str
    """To the client whose answer was being written."""
    meanwhile: str
    """To those that asked until all was well again."""
    seconds: float
    """Until then."""


@dataclass(frozen=True)
class Place:
    """Where faults are caused: a model, as checkpoint and as GGUF, and engines that fail."""

    work: Path
    checkpoint: Path
    variant: Path
    program: Path

    @contextlib.contextmanager
    def gateway(self, **more: Any) -> Iterator[Running]:
        """One backend ``m`` that is ready, and ``more`` of the configuration."""
        backend = {"path": str(self.variant), "context": CONTEXT, "slots": 2, "preload": True}
        config = {"backends": {"m": backend, **more.pop("backends", {})}, **more}
        work = Path(tempfile.mkdtemp(dir=self.work))
        (work / "home").mkdir()
        (work / "home" / "toolchains").symlink_to(home() / "toolchains")
        with gateway(work, config, QUANTKIT_LLAMA_SERVER=str(self.program)) as served:
            served.wait_for("engine ready", backend="m")
            yield served


def ask_until_served(served: Running, model: str = "m") -> tuple[str, float]:
    """What those see who ask from now on, one after the other, and the seconds to the first 200."""
    began = time.monotonic()
    seen: dict[str, None] = {}
    while True:
        try:
            answer = served.post(model)
            if answer.status_code == 200:
                return ", ".join(seen) or "wait, then 200", time.monotonic() - began
            retry = answer.headers.get("Retry-After")
            seen[f"{answer.status_code}{f', Retry-After {retry}' if retry else ''}"] = None
        except httpx.TransportError:
            seen["no connection"] = None
        time.sleep(0.05)


def end_of(stream: Stream) -> str:
    """How a stream ended, in words."""
    lines = stream.rest()
    if lines[-1] != "data: [DONE]":
        return "connection broken"
    return "error event, [DONE]" if '"error"' in lines[-2] else "whole"


def engine_killed(place: Place) -> Seen:
    with place.gateway() as served, served.streaming("m") as stream:
        served.engines()["m"].kill()
        meanwhile, seconds = ask_until_served(served)
        return Seen(end_of(stream), meanwhile, seconds)


def vllm_killed(place: Place) -> Seen:
    bulk = {"path": str(place.checkpoint), "engine": "vllm", "context": CONTEXT, "slots": 2}
    with place.gateway(backends={"bulk": bulk}) as served, served.streaming("bulk") as stream:
        for process in tree(served.engines()["bulk"].pid)[1:]:
            process.kill()
        running = end_of(stream)
        meanwhile, seconds = ask_until_served(served, "bulk")
        return Seen(running, meanwhile, seconds)


def engine_hangs(place: Place) -> Seen:
    """The seconds until another model answers."""
    hangs = {"path": str(place.variant)}
    limits = {"deadline_seconds": 3}
    with place.gateway(backends={"hangs": hangs}, limits=limits) as served:
        status = served.post("hangs").status_code
        _, seconds = ask_until_served(served)
        return Seen("–", f"{status} at the deadline; other models 200", seconds)


def starts_failing(model: str, **backend: Any) -> Callable[[Place], Seen]:
    def cause(place: Place) -> Seen:
        place.program.with_name(f"llama-server.{model}").unlink(missing_ok=True)
        with place.gateway(backends={model: {"path": str(place.variant), **backend}}) as served:
            return Seen("–", *ask_until_served(served, model))

    return cause


def file_removed(place: Place) -> Seen:
    """And the engine killed, which then cannot start; the file is back after two seconds."""
    copy = place.work / "removed.gguf"
    hidden = place.work / "hidden.gguf"
    shutil.copy(next(place.variant.glob("*.gguf")), copy)
    backend = {"path": str(copy), "context": CONTEXT}
    with place.gateway(backends={"r": backend}) as served, served.streaming("r") as stream:
        copy.rename(hidden)
        served.engines()["r"].kill()
        running = end_of(stream)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            refused = served.post("r").status_code
        hidden.rename(copy)
        seen, seconds = ask_until_served(served, "r")
        return Seen(running, f"{refused}; once it is back: {seen}", seconds)


def client_leaves(place: Place) -> Seen:
    """The seconds until the engine computes nothing any more."""
    with place.gateway() as served:
        with served.streaming("m"):
            served.until("llamacpp:requests_processing", 1, backend="m")
            began = time.monotonic()
        served.until("llamacpp:requests_processing", 0, backend="m")
        return Seen("–", "200", time.monotonic() - began)


def asked_to_end(place: Place) -> Seen:
    """The seconds until the gateway has ended."""
    with place.gateway() as served, served.streaming("m", max_tokens=500) as stream:
        began = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        served.process.wait()
        return Seen(end_of(stream), "no connection", time.monotonic() - began)


def gateway_killed(place: Place) -> Seen:
    """The seconds until none of its engines is left."""
    with place.gateway() as served:
        family = tree(served.process.pid)
        began = time.monotonic()
        served.process.kill()
        wait_until_gone(family)
        return Seen("connection broken", "no connection", time.monotonic() - began)


def log_disk_full(place: Place) -> Seen:
    """The logs of the gateway and of its engine are on a device without room."""
    work = Path(tempfile.mkdtemp(dir=place.work))
    config = {"backends": {"m": {"path": str(place.variant), "context": CONTEXT}}}
    with Path("/dev/full").open("wb") as full, gateway(work, config, stderr=full) as served:
        (work / "home" / "logs" / f"serve-{served.port}" / "m.log").symlink_to("/dev/full")
        served.post("m")
        with served.streaming("m", max_tokens=500) as stream:
            seen, seconds = ask_until_served(served)
            return Seen(end_of(stream), seen.replace("wait, then ", ""), seconds)


FAULTS: dict[str, Callable[[Place], Seen]] = {
    "llama-server killed (SIGKILL) in mid-stream": engine_killed,
    "vLLM's engine process killed in mid-stream": vllm_killed,
    "an engine never gets ready": engine_hangs,
    "an engine cannot allocate its cache, the first time": starts_failing("starved", **STARVED),
    "an engine's port is taken, the first time": starts_failing("taken", context=CONTEXT),
    "model file removed and engine killed": file_removed,
    "client closes the connection (until the engine is idle)": client_leaves,
    "SIGTERM to the gateway in mid-stream (until it has ended)": asked_to_end,
    "gateway killed (SIGKILL; until its engines are gone)": gateway_killed,
    "disk full for all logs": log_disk_full,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--vllm", action="store_true", help="The fault of vLLM too, once.")
    options = parser.parse_args()
    print("| fault | running answer | asked meanwhile | served again after, s |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        work = Path(directory)
        checkpoint = make_checkpoint(work / "model", max_position_embeddings=CONTEXT)
        variant = convert(Checkpoint.open(checkpoint), Spec("gguf", "Q8_0"), None, work).path
        program = llama_server(work, listener.getsockname()[1])
        place = Place(work, checkpoint, variant, program)
        for name, cause in FAULTS.items():
            if cause is vllm_killed and not options.vllm:
                continue
            times = 1 if cause is vllm_killed else options.repeat
            found = [cause(place) for _ in range(times)]
            seconds = sorted(one.seconds for one in found)
            spread = f" ({seconds[0]:.2f} to {seconds[-1]:.2f})" if times > 1 else ""
            running = "; ".join(dict.fromkeys(one.running for one in found))
            meanwhile = "; ".join(dict.fromkeys(one.meanwhile for one in found))
            middle = statistics.median(seconds)
            print(f"| {name} | {running} | {meanwhile} | {middle:.2f}{spread} |", flush=True)


if __name__ == "__main__":
    main()
