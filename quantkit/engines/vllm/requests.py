"""Which requests tell the likelihoods of given tokens, so that vLLM computes as little as possible.

A request gives the log-probabilities of any tokens, by id, that may follow its prompt. What the
prompt begins with comes out of vLLM's prefix cache, in whole blocks, if it was computed before: so
the choices of a question are one request, and where they are of several tokens one for each
beginning that they have. Or one request gives all tokens *inside* its prompt
(``prompt_logprobs``), but then it computes the whole prompt anew. The one is better for a few
tokens after a long context, the other for texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.engines.base import TokenScores

_IDS = 128
"""The most that vLLM takes as ``logprob_token_ids``."""
_ZERO = -9999.0
"""What vLLM writes for the logarithm of 0."""

Scored = tuple[float, bool]
"""A token's log-probability in nats, and whether it is the likeliest at its place."""


@dataclass(frozen=True)
class Request:
    """Asks for each of ``ids`` after ``prompt``; with ``inside`` > 0 also for the prompt's own
    tokens from that position on."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    inside: int = 0


@dataclass(frozen=True)
class Answer:
    """What the server said to one request: of each id, and of the prompt's tokens in order."""

    after: dict[int, Scored]
    inside: list[Scored]

    @classmethod
    def of(cls, request: Request, choice: Mapping[str, Any]) -> Answer:
        """Read a choice of ``/v1/completions``; raise KeyError, IndexError or TypeError where
        something is missing."""
        known: dict[str, float] = choice["logprobs"]["top_logprobs"][0]
        best = max(known.values())  # the token that vLLM wrote is among them
        after = {
            id_: (_log_prob(value), value >= best)
            for id_ in request.ids
            for value in [known[f"token_id:{id_}"]]
        }
        inside = []
        if request.inside:
            places = choice["prompt_logprobs"]
            for at in range(request.inside, len(request.prompt)):
                here = {name: entry["logprob"] for name, entry in places[at].items()}
                value = here[str(request.prompt[at])]
                inside.append((_log_prob(value), value >= max(here.values())))
        return cls(after, inside)


@dataclass(frozen=True)
class Question:
    """Sequences with the same context, which are scored from position ``first`` on."""

    sequences: tuple[tuple[int, ...], ...]
    first: int
    requests: tuple[Request, ...]

    def scores(self, answers: Sequence[Answer]) -> Iterator[TokenScores]:
        """The result for each sequence, from the answers to the requests."""
        import torch

        by_prompt = {
            request.prompt: answer for request, answer in zip(self.requests, answers, strict=True)
        }
        for sequence in self.sequences:
            inside = by_prompt[sequence[:-1]].inside
            found = [*inside, by_prompt[sequence[:-1]].after[sequence[-1]]]
            if not inside:
                places = range(self.first, len(sequence))
                found = [by_prompt[sequence[:at]].after[sequence[at]] for at in places]
            log_probs, is_top = zip(*found, strict=True)
            yield TokenScores(torch.tensor(log_probs), torch.tensor(is_top))


def questions(
    sequences: Sequence[Sequence[int]], first: Sequence[int], block: int
) -> Iterator[Question]:
    """Neighbours with the same context together, in the order of the sequences.

    ``first``: from where on each is scored; ``block``: tokens of a block of the prefix cache.
    """
    group: list[tuple[int, ...]] = []
    start = 0
    for sequence, begin in zip(map(tuple, sequences), first, strict=True):
        same = group and begin == start and sequence[:begin] == group[0][:begin]
        if group and not (same and len(group) < _IDS):
            yield _question(group, start, block)
            group = []
        start = begin
        group.append(sequence)
    if group:
        yield _question(group, start, block)


def _question(sequences: Sequence[tuple[int, ...]], first: int, block: int) -> Question:
    """Whichever of the two ways makes the server compute fewer tokens."""
    whole: dict[tuple[int, ...], dict[int, None]] = {}
    for sequence in sequences:
        whole.setdefault(sequence[:-1], {})[sequence[-1]] = None
    least = sum(map(len, whole))
    longest = max(map(len, sequences))
    # A text would have as many beginnings as tokens: they need not be looked for.
    if _computed(range(first, longest), first, block) <= least:
        after: dict[tuple[int, ...], dict[int, None]] = {}
        for sequence in sequences:
            for at in range(first, len(sequence)):
                after.setdefault(sequence[:at], {})[sequence[at]] = None
        if _computed(map(len, after), first, block) <= least:
            requests = [Request(prompt, tuple(ids)) for prompt, ids in after.items()]
            return Question(tuple(sequences), first, tuple(requests))
    requests = [
        Request(prompt, tuple(ids), first if first < len(prompt) else 0)
        for prompt, ids in whole.items()
    ]
    return Question(tuple(sequences), first, tuple(requests))


def _computed(lengths: Iterable[int], first: int, block: int) -> int:
    """Tokens that are computed for prompts with a context of ``first`` tokens: this once, and for
    each that goes on from it what is behind its last whole block."""
    return first + sum((length - 1) % block + 1 for length in lengths if length > first)


def _log_prob(value: float) -> float:
    return float("-inf") if value <= _ZERO else value
