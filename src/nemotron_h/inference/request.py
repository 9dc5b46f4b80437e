"""What is asked of an engine, and what comes back: an answer for each completion, growing token by token."""

import math
import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Integral
from typing import TypeGuard

import numpy as np
from torch import Tensor

from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import RequestError
from nemotron_h.inference.prefix import Cut
from nemotron_h.inference.sampling import LogitsHook, Logprobs

GREEDY = Sampling()
PRIVATE = "\0"  # the beginning of salts that are the engine's own, and never written to a folder


def private_salt(kind: str = "") -> str:
    """A salt that nobody can guess."""
    return f"{PRIVATE}{kind}{secrets.token_hex(16)}"


class Finish(StrEnum):
    """Why an answer ended: the closed list."""

    END = "end"  # the model drew an end token, which is not part of the answer
    STOP = "stop"  # a stop string was complete
    LENGTH = "length"  # max_tokens
    TIME = "time"  # max_seconds
    CANCELLED = "cancelled"
    ERROR = "error"  # `Answer.error` says which; the tokens before it stand


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, and how to go on from it. Raises: RequestError, naming the field."""

    ids: Sequence[int]
    generated: Sequence[int] = ()  # tokens of the answer that were drawn before: it goes on as if it had not stopped
    max_tokens: int = 128  # of the answer, with those
    max_seconds: float | None = None  # from when it was added; the tokens drawn until then stand
    sampling: Sampling = GREEDY
    n: int = 1  # completions, number i drawn with seed + i; a prompt that is not short is read once for all of them
    ends: Collection[int] = ()  # an answer ends before one of these
    stop: Sequence[str] = ()  # and before the first of these texts; needs a tokenizer
    marks_visible: bool = False  # in the text: control tokens of thinking and of calls, which decoding may leave out
    drawn_from: Tensor | None = None  # (vocab,) bool, of `sampling.drawable`; None: all that the tokenizer knows
    logprobs: int | None = None  # of each token, and of so many of the likeliest beside; None: of none
    hook: LogitsHook | None = None  # changes the logits before a token is drawn; of its arguments alone: draws of n
    # completions come in turns, and may come again
    boundaries: Sequence[int] = ()  # places in ids where another prompt may part from this one
    cache_salt: str = ""  # only requests of one salt reuse what each other has read; those after a NUL are private
    reuse: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check_kinds()
        if self.n < 1:
            raise RequestError(f"n: must be 1 or above; got {self.n}")
        if self.sampling.seed + self.n - 1 >= 2**63:
            raise RequestError(f"n: must leave seeds below 2^63, each completion's own; got {self.n}")
        if self.max_seconds is not None and not (math.isfinite(self.max_seconds) and self.max_seconds > 0):
            raise RequestError(f"max_seconds: must be above 0, or None; got {self.max_seconds}")
        if self.logprobs is not None and not 0 <= self.logprobs <= 128:
            raise RequestError(f"logprobs: must lie in 0..128, or None; got {self.logprobs}")
        if len(self.generated) and self.n != 1:
            raise RequestError(f"n: must be 1 where an answer goes on; got {self.n}")
        if len(self.generated) >= max(1, self.max_tokens):
            raise RequestError(
                f"max_tokens: must be above the {len(self.generated)} tokens of generated; got {self.max_tokens}"
            )
        for place in self.boundaries:
            if not is_whole(place) or not 0 <= place <= len(self.ids):
                raise RequestError(f"boundaries: must lie in 0..{len(self.ids)}; got {place}")

    def _check_kinds(self) -> None:
        """Refuse what would be found out in the middle of a step, where others are served."""
        for name, kind in (("ids", Sequence), ("generated", Sequence), ("ends", Collection), ("boundaries", Sequence)):
            given = getattr(self, name)
            if not isinstance(given, (kind, np.ndarray)):
                raise RequestError(f"{name}: must be a {kind.__name__.lower()} of integers; got {given!r}")
        if not all(is_whole(token) for token in self.ends):
            raise RequestError(f"ends: must be integers; got {self.ends!r}")
        for name in ("n", "logprobs"):
            given = getattr(self, name)
            if not is_whole(given) and not (name == "logprobs" and given is None):
                raise RequestError(f"{name}: must be a whole number; got {given!r}")
        if self.drawn_from is not None and not isinstance(self.drawn_from, Tensor):
            raise RequestError(f"drawn_from: must be a tensor, as `drawable` makes it; got {self.drawn_from!r}")


@dataclass(frozen=True, slots=True)
class Reuse:
    """What became of a prompt's tokens: prompt = reused + read, and `cut` says why no more was reused."""

    prompt: int
    matched: int  # known: read before, by this request's salt
    reused: int  # not read again
    cut: Cut


@dataclass(slots=True, eq=False)
class Answer:
    """One completion, as far as it has come."""

    request: Request
    index: int  # which of the request's n
    ids: list[int] = field(default_factory=list)
    text: str = ""  # of the ids, where the engine has a tokenizer: whole characters, up to a stop string
    certain: list[int] = field(default_factory=list)  # for each of ids: characters of the text that stood with it
    logprobs: list[Logprobs] = field(default_factory=list)
    reuse: Reuse | None = None  # known once reading begins
    finish: Finish | None = None  # None: it goes on
    error: str | None = None
    drafted: int = 0  # tokens read ahead of being known
    accepted: int = 0  # of them, those that came
    added: float = field(default_factory=time.perf_counter)  # seconds, on a clock of no meaning
    begun: float | None = None  # its first token came
    ended: float | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """What one step did to one answer."""

    answer: Answer
    token: int | None  # None: it ended without another
    text: str  # that is certain now
    logprobs: Logprobs | None = None


class News:
    """What is done to answers, each thing told once: read off the answers, so that none is lost where a step ends in
    the middle."""

    def __init__(self, answers: Iterable[Answer] = ()) -> None:
        self._told: dict[Answer, int] = {}  # ids of each that go on, as far as they were told
        self.follow(answers)

    @property
    def over(self) -> bool:
        """Has every answer's end been told?"""
        return not self._told

    def follow(self, answers: Iterable[Answer]) -> None:
        """Tell of these too, from now on."""
        self._told |= {answer: len(answer.ids) for answer in answers}

    def take(self) -> list[Update]:
        """What is new."""
        updates = [update for answer, told in self._told.items() for update in updates_since(answer, told)]
        self._told = {answer: len(answer.ids) for answer in self._told if answer.finish is None}
        return updates


def updates_since(answer: Answer, told: int) -> Iterator[Update]:
    """What was done to an answer since it had so many ids."""
    begin = answer.certain[told - 1] if told else 0
    without = len(answer.ids) - len(answer.logprobs)  # tokens that were drawn before, or whose nobody asked for
    for place in range(told, len(answer.ids)):
        end = answer.certain[place]
        chances = answer.logprobs[place - without] if place >= without else None
        yield Update(answer, answer.ids[place], answer.text[begin:end], chances)
        begin = end
    if answer.finish is not None:
        yield Update(answer, None, answer.text[begin:])


def check_ids(ids: Iterable[int], vocab: int, name: str) -> None:
    """Refuse what is no token of the vocabulary."""
    for place, token in enumerate(ids):
        if not is_whole(token) or not 0 <= token < vocab:
            raise RequestError(f"{name}: must be integers in 0..{vocab - 1}; got {token!r} at place {place}")


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)
