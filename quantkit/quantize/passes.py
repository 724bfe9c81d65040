"""Forward passes that wait at linears of a block, and go on when these have been quantized.

Each linear is quantized for what those before it give by then: a block's activations come to light
one linear after another. Instead of running the block anew up to each of them, a pass waits where
it is, in a thread of its own; no two run at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType

import torch
from torch import nn

from quantkit.decoder.activations import Activations
from quantkit.quantize.inputs import Reached, multiplied, reach
from quantkit.system.stopwatch import stage

WAITING_BYTES = 1 << 30
"""Bytes that the passes of one stream may hold while they wait; further windows run anew."""


class Passes:
    """All calibration windows of one stream on their way through a block.

    ``run``: computes a block's output for one batch. ``linears``: where passes wait, in the order
    of their calls. ``streams``: by linear, the module that is given the residual stream which the
    linear's output is to be added to.
    """

    def __init__(
        self,
        module: nn.Module,
        activations: Activations,
        run: Callable[[torch.Tensor, nn.Module], torch.Tensor],
        linears: Sequence[str],
        streams: Mapping[str, str],
    ) -> None:
        self._module, self._activations, self._streams = module, activations, streams
        self._run = run
        widths = (module.get_parameter(f"{name}.weight").shape[1] for name in linears)
        widest = max(widths, default=0)
        samples, length, hidden = activations.shape
        each = -(-samples // len(activations)) * length * (hidden + widest) * 4
        passes = [_Pass(partial(self._go, number)) for number in range(len(activations))]
        self._waiting = passes[: WAITING_BYTES // each]
        self._hooks = []
        for linear in linears:
            norm = streams.get(linear)
            wait = partial(_wait, linear)
            self._hooks.append(module.get_submodule(linear).register_forward_pre_hook(wait))
            if norm:
                see = partial(_see, linear)
                self._hooks.append(module.get_submodule(norm).register_forward_pre_hook(see))

    def __enter__(self) -> Passes:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        for one in self._waiting:
            one.stop()
        self._waiting.clear()
        for hook in self._hooks:
            hook.remove()

    def reach(self, linear: str) -> Iterator[Reached]:
        """What the linear is given now, batch by batch; the linears in turn, each once."""
        for number in range(len(self._activations)):
            with stage("forward"):
                if number < len(self._waiting):
                    reached = self._waiting[number].to(linear)
                else:
                    run = partial(self._run, self._activations.batch(number))
                    reached = reach(self._module, linear, self._streams.get(linear), run)
            yield reached

    def finish(self) -> None:
        """Put the outputs of the block in the place of its inputs."""
        for number in range(len(self._activations)):
            with stage("forward"):
                if number < len(self._waiting):
                    output = self._waiting[number].to_the_end()
                else:
                    output = self._go(number)
            self._activations.replace(number, output)

    def _go(self, number: int) -> torch.Tensor:
        return self._run(self._activations.batch(number), self._module)


class _Pass(threading.Thread):
    """One batch on its way. Either it runs, or the thread that calls its methods does."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        super().__init__(daemon=True)
        self._forward = run
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._at: tuple[str, Reached] | None = None
        self._stopped = False
        self._output: torch.Tensor | None = None
        self._error: BaseException | None = None
        self.seen: dict[str, torch.Tensor] = {}
        """The residual stream that each linear's output is added to, (tokens, hidden)."""

    def to(self, linear: str) -> Reached:
        """Go on as far as this linear."""
        self._resume()
        assert self._at is not None
        assert self._at[0] == linear
        reached, self._at = self._at[1], None
        return reached

    def to_the_end(self) -> torch.Tensor:
        """Go on to the output."""
        self._resume()
        assert self._output is not None
        output, self._output = self._output, None
        return output

    def stop(self) -> None:
        """End where it is."""
        self._stopped = True
        if self.is_alive():
            self._turn.release()
            self.join()

    def wait_at(self, linear: str, reached: Reached) -> None:
        """Called in its own thread: let the other one go on."""
        self._at = linear, reached
        self._back.release()
        self._turn.acquire()
        if self._stopped:
            raise _Stopped

    def run(self) -> None:
        """The thread."""
        try:
            self._output = self._forward()
        except _Stopped:
            pass
        except BaseException as error:  # the other thread's to raise
            self._error = error
        self._back.release()

    def _resume(self) -> None:
        if self.ident is None:
            self.start()
        else:
            self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error


class _Stopped(Exception):
    pass


def _wait(linear: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    thread = threading.current_thread()
    if isinstance(thread, _Pass):
        stream = thread.seen.pop(linear, None)
        thread.wait_at(linear, Reached(_rows(multiplied(inputs[0])), stream))


def _see(linear: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    thread = threading.current_thread()
    if isinstance(thread, _Pass):
        thread.seen[linear] = _rows(inputs[0])


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
