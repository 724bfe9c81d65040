"""What an engine is: what it can do, and the two ways to use it, scoring and serving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from quantkit.errors import EngineError, IncompatibleVariant
from quantkit.models.engine_config import EngineConfig, Option
from quantkit.models.variant import Model

if TYPE_CHECKING:
    import torch

    from quantkit.engines.process import RunningServer
    from quantkit.engines.server import ServeOptions, ServerCommand


@dataclass(frozen=True)
class Capabilities:
    """What callers ask instead of asking which class an engine is.

    ``logits``: whether the engine gives the whole vocabulary's logits at any position (``full``),
    the best few (``topk``), or ``none`` in process. ``sums_choices``: whether its server counts the
    tokens of all choices of an answer, or of the first one.
    """

    formats: frozenset[str]
    logits: Literal["full", "topk", "none"]
    serves: bool
    devices: tuple[str, ...]
    sums_choices: bool = True


@dataclass(frozen=True)
class TokenScores:
    """What a model says of tokens that it is given.

    ``log_probs``: ``(n,) float32``, nats; ``is_top``: ``(n,) bool``, whether each token was the
    likeliest at its place.
    """

    log_probs: torch.Tensor
    is_top: torch.Tensor


class LanguageModel(Protocol):
    """A loaded model, wherever it runs; used as a context manager, which frees it at the end."""

    def likelihoods(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[TokenScores]:
        """For each sequence i in order: the scores of its tokens ``first[i]`` (from 1 on) to the
        last, each given all tokens before it. Nothing is added to the ids.

        Raises EngineError where the engine refuses or a sequence exceeds its context.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        ends: Callable[[Sequence[int]], bool],
    ) -> Iterator[list[int]]:
        """For each prompt in order: the greedy answer's ids, at most ``max_tokens``.

        ``ends`` is asked after each new token with the answer so far, that token included, and
        ends it where true; what it looks for (EOS, a stop string) is the caller's.
        """
        ...


class Scorer(LanguageModel, Protocol):
    """A model in this process, which gives the logits of the whole vocabulary."""

    def logits(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        """For each sequence i in order: the logits at its positions ``first[i]`` to the last.

        Position t holds the logits of the token that follows ``sequences[i][:t + 1]``.
        Yields ``(len(sequences[i]) - first[i], vocabulary) float32`` on the CPU, one tensor a
        sequence, computed no further ahead than the engine's batch. Nothing is added to the ids.
        Neighbours that begin alike share the work of what they have in common: sort them.
        Raises EngineError where the engine refuses or a sequence exceeds its context.
        """
        ...

    def likelihoods(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[TokenScores]:
        """See ``LanguageModel.likelihoods``; out of the logits."""
        import torch

        inputs = [sequence[:-1] for sequence in sequences]
        rows = self.logits(inputs, [start - 1 for start in first])
        for sequence, start, logits in zip(sequences, first, rows, strict=True):
            wanted = torch.tensor(sequence[start:])
            chosen = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
            yield TokenScores(chosen, logits.argmax(-1) == wanted)


class Engine(Protocol):
    """One way to run a model, made with its options.

    Register a new one in ``quantkit.registry.ENGINES``; another package does so by an entry point
    ``quantkit.engines``.
    """

    name: str
    capabilities: Capabilities
    options: Mapping[str, Option]
    """What it was made with; see ``EngineConfig``."""

    def version(self) -> str | None:
        """The installed version, or None where it is not installed."""
        ...

    def check(self, model: Model) -> None:
        """Raise ToolchainError where the engine is not installed, IncompatibleVariant where it
        cannot load this model; cheap, before anything is started."""
        ...

    def language_model(self, model: Model, context: int) -> AbstractContextManager[LanguageModel]:
        """Load the model for sequences up to ``context`` tokens, in this process or in a server:
        what asks for no more than likelihoods and answers runs on every engine."""
        ...


class ScoringEngine(Engine, Protocol):
    """An engine that gives the logits of the whole vocabulary, in this process."""

    def scorer(self, model: Model, context: int) -> AbstractContextManager[Scorer]:
        """Load the model in this process for sequences up to ``context`` tokens."""
        ...


class ServingEngine(Engine, Protocol):
    """An engine that has a server."""

    def server(self, model: Model, options: ServeOptions) -> ServerCommand:
        """The command that serves the model behind an OpenAI-compatible API."""
        ...

    def attached(
        self, model: Model, server: RunningServer, context: int
    ) -> AbstractContextManager[LanguageModel] | None:
        """The model as its running server scores it, for sequences up to ``context`` tokens, one at
        a time; None where the engine does that in this process."""
        ...

    def load_seconds(self, log: str) -> float | None:
        """How long the server took to read the weights, as its log says; None where it does not."""
        ...


def scoring(engine: Engine, model: Model) -> ScoringEngine:
    """The engine, to score ``model``; raise IncompatibleVariant where it gives no logits."""
    if engine.capabilities.logits != "full":
        raise IncompatibleVariant(
            f"{engine.name} gives no logits of the whole vocabulary ({model.path}); evaluate it "
            "with transformers or llamacpp"
        )
    return cast(ScoringEngine, engine)


def serving(engine: Engine, model: Model) -> ServingEngine:
    """The engine, to serve ``model``; raise IncompatibleVariant where it does not serve."""
    if not engine.capabilities.serves:
        raise IncompatibleVariant(
            f"{engine.name} does not serve ({model.path}); `quantkit engines list` says which do"
        )
    return cast(ServingEngine, engine)


def config_of(engine: Engine) -> EngineConfig:
    """What results say of it: name, installed version and options."""
    return EngineConfig(name=engine.name, version=engine.version(), options=dict(engine.options))


def check_context(
    engine: str, sequences: Sequence[Sequence[int]], context: int, path: Path
) -> None:
    """Raise EngineError for a sequence longer than what the model at ``path`` was opened for."""
    longest = max(map(len, sequences), default=0)
    if longest > context:
        raise EngineError(
            f"{engine}: a sequence has {longest} tokens, the scorer was opened for {context} "
            f"({path})"
        )


def check_format(engine: Engine, model: Model) -> None:
    """Raise IncompatibleVariant where the engine does not take the model's format."""
    if model.format not in engine.capabilities.formats:
        raise IncompatibleVariant(
            f"{engine.name} does not load {model.format} ({model.path}); it takes "
            f"{', '.join(sorted(engine.capabilities.formats))}"
        )
