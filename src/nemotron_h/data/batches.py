"""Batches as a pure function of seed and place, so that a run resumes from one integer.

A shard's documents, one after the other, are one row of N tokens. Window w has the inputs from w * l to w * l + l - 1,
l the sequence length, and as target of each the token after it: ceil((N - 1) / l) windows, in which every token but the
first is a target once. The last window is padded where the row ends before it does; its padding has ignored targets.
Where a document begins, the token before it, of another document, has an ignored target too.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemotron_h.data.permutation import permute
from nemotron_h.data.shards import Shard
from nemotron_h.errors import DataError

DIGESTED, STRETCH = 256, 4096  # stretches of a shard that tell it from others, and tokens of each
IGNORED = -100  # a target that counts for nothing, as in the loss
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """b windows of l tokens, all int64 (b, l). targets: the next token, or IGNORED.

    documents: constant along a document and growing at its end, 0 at the start of each row.
    """

    inputs: Integers
    targets: Integers
    documents: Integers


class Batches:
    """Training batches without end: each epoch is every window once, in an order that seed and epoch name."""

    def __init__(self, shard: Shard, sequence_length: int, batch_size: int, seed: int) -> None:
        self.windows_per_epoch = count_windows(shard, sequence_length)
        if batch_size < 1:
            raise DataError(f"batch_size: must be positive; got {batch_size}")
        self._shard, self._length, self._size, self._seed = shard, sequence_length, batch_size, seed

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which tokens a place has: a run goes on only with the same."""
        return {"windows_per_epoch": self.windows_per_epoch, "order_seed": self._seed, "shard": _digest(self._shard)}

    def at(self, place: int) -> Batch:
        """The batch after `place` windows, which may lie across two epochs; the next one is at place + batch_size."""
        if place < 0:
            raise DataError(f"place: must not be negative; got {place}")
        epochs, indices = np.divmod(np.arange(place, place + self._size), self.windows_per_epoch)
        chosen = np.empty(self._size, np.int64)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            chosen[now] = permute(indices[now], self.windows_per_epoch, seed=self._seed, epoch=int(epoch))
        return _cut(self._shard, self._length, chosen)


def windows(shard: Shard, sequence_length: int, batch_size: int, *, limit: int | None = None) -> Iterator[Batch]:
    """The windows of a shard in order, each once: their losses add up to the loss of the whole shard.

    limit: take at most so many, evenly spread. The last batch is smaller where they do not fill it.
    """
    count = count_windows(shard, sequence_length)
    if batch_size < 1:
        raise DataError(f"batch_size: must be positive; got {batch_size}")
    if limit is not None and limit < 1:
        raise DataError(f"limit: must be positive; got {limit}")
    taken = min(limit or count, count)
    chosen = np.arange(taken) * count // taken
    for begin in range(0, taken, batch_size):
        yield _cut(shard, sequence_length, chosen[begin : begin + batch_size])


def count_windows(shard: Shard, sequence_length: int) -> int:
    """How many windows an epoch has."""
    if sequence_length < 1:
        raise DataError(f"sequence_length: must be positive; got {sequence_length}")
    if len(shard.tokens) < 2:
        raise DataError(f"{shard.name}: must hold two tokens or more; got {len(shard.tokens)}; add documents")
    return -(-(len(shard.tokens) - 1) // sequence_length)


def _digest(shard: Shard) -> str:
    """Of the document borders and of up to DIGESTED stretches of tokens, evenly spread: seconds at any size."""
    digest = hashlib.sha256(np.ascontiguousarray(shard.document_starts, dtype=np.int64).tobytes())
    count = len(shard.tokens)
    for begin in np.unique(np.linspace(0, max(0, count - STRETCH), DIGESTED, dtype=np.int64)):
        digest.update(shard.tokens[begin : begin + STRETCH].astype(np.int64).tobytes())
    return digest.hexdigest()[:16]


def _cut(shard: Shard, length: int, chosen: Integers) -> Batch:
    """The windows of those numbers, one a row."""
    places = chosen[:, None] * length + np.arange(length + 1)  # (b, l + 1)
    there = places < len(shard.tokens)
    places = np.minimum(places, len(shard.tokens) - 1)
    tokens = np.where(there, shard.tokens[places].astype(np.int64), 0)
    documents = np.searchsorted(shard.document_starts, places, side="right")
    documents -= documents[:, :1]
    counted = there[:, 1:] & (documents[:, 1:] == documents[:, :-1])
    return Batch(tokens[:, :-1].copy(), np.where(counted, tokens[:, 1:], IGNORED), documents[:, :-1].copy())
