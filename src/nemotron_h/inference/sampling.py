"""Which token comes next, from its logits: bias, penalties, the request's hook, temperature, top-k, top-p, min-p.

`distribution` is the definition of the last four; `choices` finds the same tokens and bits without sorting the
vocabulary. Everything is numpy on the CPU, one row at a time: a row's bits depend on nothing beside it.
Of tokens that are equally likely, the lower id goes first.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import RequestError

# The tokens of the reply so far, to read, and their logits (vocab,) float32, to change in place or not -> the logits to
# draw from. -inf forbids a token.
LogitsHook = Callable[[Sequence[int], Tensor], Tensor]
Logprobs: TypeAlias = tuple[float, tuple[tuple[int, float], ...]]  # a token's; (id, its own) of the likeliest, in order

Ids: TypeAlias = NDArray[np.int64]
Row: TypeAlias = NDArray[np.float32]  # logits (vocab,)
Floats: TypeAlias = NDArray[np.float64]

QUANTUM = 2.0**-35  # of the likeliest token's chance: what top-p tells apart


class Sampler:
    """The draws of one request, and what they depend on: the tokens so far, and numbers of its own."""

    def __init__(
        self,
        sampling: Sampling,
        *,
        prompt: Iterable[int] = (),
        generated: Iterable[int] = (),
        drawn_from: Tensor | None = None,
        hook: LogitsHook | None = None,
    ) -> None:
        """generated: the reply so far, where a request goes on: the next draws are as if it had not stopped.
        drawn_from: (vocab,) bool, as `drawable` gives it; None: all tokens.
        """
        self.sampling = sampling
        self.hook = hook
        self.allowed = None if drawn_from is None else drawn_from.cpu().numpy()
        self.bias_ids = np.array([token for token, _ in sampling.logit_bias], np.int64)
        self.bias = np.array([bias for _, bias in sampling.logit_bias], np.float64)
        self.penalised = (
            sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
        )
        self.prompt = np.array(list(prompt) if self.penalised else [], np.int64)
        self.rewind(generated)

    def rewind(self, generated: Iterable[int]) -> None:
        """The reply so far is this."""
        self.generated = list(generated)
        if self.penalised:
            reply = np.array(self.generated, np.int64)
            self.seen = np.unique(np.concatenate([self.prompt, reply]))  # ascending
            self.counts = np.bincount(np.searchsorted(self.seen, reply), minlength=len(self.seen))  # in the reply

    def draw(self, logits: Tensor) -> int:
        """The next token, remembered, of the model's logits (vocab,) float32.

        Raises: RequestError where they are not finite, where nothing is left to draw, where logit_bias names no token.
        """
        row = self._steered(finite_row(logits))
        if self.sampling.temperature == 0:
            token = int(row.argmax())
        else:
            ids, probabilities = choices(row, self.sampling)
            token = int(ids[place(probabilities, uniform(self.sampling.seed, len(self.generated)))])
        self.generated.append(token)
        if self.penalised:
            self._count(token)
        return token

    def _steered(self, row: Row) -> Row:
        """The logits after bias, penalties and hook, -inf for what must not be drawn; row is left as it is."""
        if not len(self.bias) and not self.penalised and self.hook is None and self.allowed is None:
            return row
        with np.errstate(over="ignore"):  # of float32; checked below
            if len(self.bias):
                row = self._biased(row)
            if self.penalised:
                row = self._penalised(row)
        if self.hook is not None:
            row = self._hooked(row)
        if self.allowed is not None:
            row = np.where(self.allowed, row, np.float32(-np.inf))
        highest = row.max()
        name = "logits" if self.hook is None else "hook"
        if highest == -np.inf:
            raise RequestError(f"{name}: must leave a token to draw; got -inf for all that may be drawn")
        if not np.isfinite(highest):
            raise RequestError(f"{name}: must leave logits that are finite or -inf; got {highest}")
        return row

    def _biased(self, row: Row) -> Row:
        if self.bias_ids[-1] >= len(row):
            raise RequestError(f"logit_bias: must name tokens of 0..{len(row) - 1}; got {self.bias_ids[-1]}")
        row = row.copy()
        row[self.bias_ids] = row[self.bias_ids] + self.bias
        return row

    def _penalised(self, row: Row) -> Row:
        sampling, row = self.sampling, row.copy()
        seen = row[self.seen].astype(np.float64)
        seen = np.where(seen > 0, seen / sampling.repetition_penalty, seen * sampling.repetition_penalty)
        seen -= sampling.frequency_penalty * self.counts + sampling.presence_penalty * (self.counts > 0)
        row[self.seen] = seen
        return row

    def _hooked(self, row: Row) -> Row:
        assert self.hook is not None
        try:
            changed = self.hook(self.generated, torch.from_numpy(row.copy()))
        except Exception as error:  # the request's own code: it ends that request, and nobody else's
            raise RequestError(f"hook: must not raise; got {type(error).__name__}: {error}") from error
        if not isinstance(changed, Tensor) or changed.shape != row.shape:
            got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise RequestError(f"hook: must return logits of shape {row.shape}; got {got}")
        return as_row(changed)

    def _count(self, token: int) -> None:
        index = int(np.searchsorted(self.seen, token))
        if index == len(self.seen) or self.seen[index] != token:
            self.seen, self.counts = np.insert(self.seen, index, token), np.insert(self.counts, index, 0)
        self.counts[index] += 1


def drawable(ids: Collection[int] | None, vocab_size: int) -> Tensor | None:
    """(vocab_size,) bool: these ids; None where they are all. Takes milliseconds: once a tokenizer, not once a draw."""
    if ids is None:
        return None
    allowed = np.zeros(vocab_size, bool)
    allowed[np.fromiter(ids, np.int64, len(ids))] = True
    return None if allowed.all() else torch.from_numpy(allowed)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (vocab,) float64 of logits (vocab,), temperature above 0: the definition, which sorts them all."""
    row = as_row(logits)
    ids = np.sort(np.argsort(-row, kind="stable")[: sampling.top_k or None])
    chances = weights(row[ids], sampling.temperature)
    if sampling.top_p < 1:
        parts = summable(chances)
        order = np.argsort(-parts, kind="stable")
        reached = np.cumsum(parts[order])
        fewest = np.sort(order[: 1 + np.count_nonzero(reached < sampling.top_p * parts.sum())])
        ids, chances = ids[fewest], chances[fewest]
    near = chances >= sampling.min_p  # the likeliest weighs 1
    ids, chances = ids[near], chances[near]
    probabilities = np.zeros(len(row))
    probabilities[ids] = chances / chances.sum()
    return torch.from_numpy(probabilities)


def choices(row: Row, sampling: Sampling) -> tuple[Ids, Floats]:
    """The tokens that `distribution` leaves, by rising id, and their probabilities: the same bits."""
    ids = likeliest(row, sampling.top_k) if sampling.top_k else np.arange(len(row))
    chances = weights(row if len(ids) == len(row) else row[ids], sampling.temperature)
    if sampling.top_p < 1:
        fewest = fewest_reaching(chances, sampling.top_p)
        ids, chances = ids[fewest], chances[fewest]
    if sampling.min_p:
        near = np.flatnonzero(chances >= sampling.min_p)
        ids, chances = ids[near], chances[near]
    chances /= chances.sum()
    return ids, chances


def weights(row: Row, temperature: float) -> Floats:
    """What probabilities are proportional to: 1 for the likeliest."""
    # less the largest before the division: a small temperature overflows to -inf, never to NaN
    shifted = row.astype(np.float64)
    shifted -= row.max()
    with np.errstate(over="ignore"):
        shifted /= temperature
    return np.exp(shifted, out=shifted)


def likeliest(row: Row, count: int) -> Ids:
    """The ids of the `count` largest logits, rising."""
    if count >= len(row):
        return np.arange(len(row))
    # torch: numpy's partition takes three times as long
    return largest(row, torch.from_numpy(row).topk(count, sorted=False).values.min().item(), count)


def fewest_reaching(chances: Floats, share: float) -> Ids:
    """The places, rising, of the fewest largest of chances that together have this share of their sum, below 1."""
    parts = summable(chances)
    total = parts.sum()
    goal = share * total
    # those below this bound have less than 1 - share of the sum together: the others reach the goal
    near = np.flatnonzero(parts >= (1 - share) * total / len(parts))
    parts = parts[near]
    # by a float's exponent and first 7 bits, which rise as floats do: only the bucket that reaches the goal is sorted
    buckets = parts.view(np.int64) >> 45
    buckets -= buckets.min()
    masses = np.bincount(buckets, parts)
    reached = masses[::-1].cumsum()  # largest bucket first
    found = int(np.searchsorted(reached, goal))
    bucket = len(masses) - 1 - found
    inside = -np.sort(-parts[buckets == bucket])
    last = int(np.searchsorted(reached[found] - masses[bucket] + inside.cumsum(), goal))
    return near[largest(parts, inside[last], int(np.count_nonzero(buckets > bucket)) + last + 1)]


def summable(chances: Floats) -> Floats:
    """Chances of at most 1, rounded to multiples of QUANTUM: sums of 2^18 of them are exact, in any order."""
    coarse = QUANTUM * 2**52  # whose neighbours in float64 lie one quantum apart
    parts = chances + coarse
    parts -= coarse
    return parts


def largest(values: Row | Floats, least: float, count: int) -> Ids:
    """The places, rising, of the `count` largest, the smallest of which is `least`; of equals the first."""
    places = np.flatnonzero(values >= least)
    ties = np.flatnonzero(values[places] == least)
    return np.delete(places, ties[len(ties) - (len(places) - count) :])


def place(probabilities: Floats, number: float) -> int:
    """Where in the running sum of probabilities a number of [0, 1) falls: never on a probability of 0."""
    running = torch.from_numpy(probabilities).cumsum(0).numpy()  # torch: four times as fast as numpy
    # number is at most 1 - 2^-53: rounded, too, the product is below the last sum
    return int(np.searchsorted(running, number * running[-1], side="right"))


def uniform(seed: int, draw: int) -> float:
    """The number in [0, 1) of a request's draw 0, 1, ...: a function of these two alone, of 53 bits."""
    return float((np.random.Philox(key=seed, counter=draw).random_raw() >> 11) * 2.0**-53)


def logprobs(logits: Tensor, token: int, top: int) -> Logprobs:
    """Natural logarithms of the model's own probabilities: of token, and of the `top` likeliest.

    logits (vocab,) float32, as the model gives them: no bias, penalty or temperature counts.
    """
    row = finite_row(logits)
    if not 0 <= top <= len(row):
        raise RequestError(f"top: must lie in 0..{len(row)}, the vocabulary; got {top}")
    ids = likeliest(row, top) if top else np.arange(0)
    ids = np.append(token, ids[np.argsort(-row[ids], kind="stable")])
    shifted = row.astype(np.float64) - row.max()
    own, *best = (shifted[ids] - np.log(np.exp(shifted).sum())).tolist()
    return own, tuple(zip(ids[1:].tolist(), best, strict=True))


def finite_row(logits: Tensor) -> Row:
    """The model's logits as numbers. Raises: RequestError where they are none."""
    row = as_row(logits)
    if not (np.isfinite(row.min()) and np.isfinite(row.max())):  # either is NaN where any is
        raise RequestError("logits: must be finite; the model gave NaN or infinity; is the checkpoint damaged?")
    return row


def as_row(logits: Tensor) -> Row:
    return logits.detach().float().cpu().numpy()
