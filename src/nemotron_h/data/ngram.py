"""Byte n-grams: what tables of counts predict, the baseline a model must beat. Interpolated modified Kneser-Ney.

    p_n(b | c) = (max(N(cb) - D(N(cb)), 0) + (D(1) T_1 + D(2) T_2 + D(3) T_3) p_{n-1}(b | c')) / N(c)
    p_0(b) = 1/256                                        p_n(b | c) = p_{n-1}(b | c') where N(c) = 0

Legend: b a byte; c the n - 1 bytes before it; c' the same without the first; N(c) the sum of N(cb) over b;
T_k how many b have N(cb) = k, T_3 those with 3 or more.
N counts occurrences in the highest order, and in lower ones how many different bytes come before: what follows a rare
context is what follows many contexts, not what is frequent.
D(k) = k - (k + 1) n_{k+1} / n_k * n_1 / (n_1 + 2 n_2), n_k the n-grams of that order counted k times; above 3, D(3).
Where an n_k is zero or a D not positive (few n-grams), the D of that order are 1/2, 1 and 3/2. D(0) = 0.
Contexts never reach over a document's start: there, the order is the bytes there are plus one.
Source: Chen and Goodman 1998, "An empirical study of smoothing techniques for language modeling", section 3.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemotron_h.errors import DataError

MAX_ORDER = 8  # an n-gram is a 64-bit word
NUM_BYTES = 256
Keys = NDArray[np.uint64]  # n bytes, the first one highest
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


def definition(documents: Sequence[bytes], context: bytes, order: int) -> list[float]:
    """The probability of each byte after context, as the formula reads. Every other path must equal it."""
    order = min(order, len(context) + 1)
    occurrences = [
        Counter(text[i : i + n] for text in documents for i in range(len(text) - n + 1)) for n in range(order + 1)
    ]
    p = [1 / NUM_BYTES] * NUM_BYTES
    for n in range(1, order + 1):
        counts = occurrences[n] if n == order else Counter(gram[1:] for gram in occurrences[n + 1])
        D = discounts(np.array(list(counts.values())))
        here = [counts[context[len(context) - n + 1 :] + bytes([b])] for b in range(NUM_BYTES)]
        if total := sum(here):
            spared = sum(D[min(count, 3)] for count in here)
            p = [(max(count - D[min(count, 3)], 0) + spared * low) / total for count, low in zip(here, p, strict=True)]
    return p


def discounts(counts: Integers) -> Floats:
    """D(0), D(1), D(2), D(3) for the counts of all n-grams of one order."""
    n = [np.count_nonzero(counts == k) for k in (1, 2, 3, 4)]
    D = np.array([0, 0.5, 1, 1.5])
    if all(n):
        share = n[0] / (n[0] + 2 * n[1])
        estimated = [k - (k + 1) * n[k] / n[k - 1] * share for k in (1, 2, 3)]
        if min(estimated) > 0:
            D[1:] = estimated
    return D


@dataclass(frozen=True)
class _Counts:
    """One way of counting the n-grams of one order. Each array ends with an entry for what was never seen, zero."""

    counts: Integers  # of each n-gram
    totals: Integers  # of each context: N(c)
    spared: Floats  # of each context: what the discounts leave to the lower order
    D: Floats

    def probability(self, gram: Integers, context: Integers, lower: Floats) -> Floats:
        """p_n from p_{n-1}; gram and context: where each one stands in the arrays, -1 where it was never seen."""
        count, total = self.counts[gram], self.totals[context]
        kept = np.maximum(count - self.D[np.minimum(count, 3)], 0)
        return np.where(total > 0, (kept + self.spared[context] * lower) / np.maximum(total, 1), lower)


@dataclass(frozen=True)
class _Order:
    """All n-grams of one length: sorted, as are the contexts they begin with."""

    keys: Keys
    contexts: Keys
    occurrences: _Counts
    continuations: _Counts


class Ngrams:
    """Counts of every order up to one, of documents of bytes."""

    def __init__(
        self, documents: Sequence[bytes], order: int = 6, *, progress: Callable[[float], None] | None = None
    ) -> None:
        """order: bytes in the longest n-gram, 1 to 8. progress: called with the fraction done.

        Takes 20 to 35 bytes of memory for each byte of documents. Raises: DataError where there is no byte to count.
        """
        if not 1 <= order <= MAX_ORDER:
            raise DataError(f"order: must lie in 1..{MAX_ORDER}; got {order}")
        if not any(documents):
            raise DataError(f"documents: must hold a byte to count; got {len(documents)} without any")
        tell = progress or (lambda done: None)
        grams = _count(documents, order, lambda done: tell(0.7 * done))
        self.order = order
        self._orders: list[_Order] = []
        for n, (keys, counts) in enumerate(grams, start=1):
            before = _continuations(keys, grams[n][0], n) if n < order else np.zeros_like(counts)
            contexts, groups = _runs(keys >> np.uint64(8))
            self._orders.append(_Order(keys, contexts, _tabulate(counts, groups), _tabulate(before, groups)))
            tell(0.7 + 0.3 * n / order)

    def distribution(self, context: bytes, order: int | None = None) -> Floats:
        """The probability of each byte after context, a document so far; order: self.order unless given."""
        context = context[-(self.order - 1) :] if self.order > 1 else b""
        word = int.from_bytes(context, "big") << 8
        windows = np.array([(word | b) & (2**64 - 1) for b in range(NUM_BYTES)], np.uint64)
        for n, p in self._probabilities(windows, np.full(NUM_BYTES, len(context) + 1)):
            if n == (order or self.order):
                return p
        raise DataError(f"order: must lie in 1..{self.order}; got {order}")

    def bits_per_byte(
        self, documents: Sequence[bytes], *, progress: Callable[[float], None] | None = None
    ) -> list[float]:
        """Bits per byte of documents that were not counted, for order 1, 2, ... each by itself."""
        if not any(documents):
            raise DataError(f"documents: must hold a byte to predict; got {len(documents)} without any")
        windows, lengths = _windows_before(documents, self.order)
        bits = []
        for n, p in self._probabilities(windows, lengths):
            bits.append(float(-np.log2(p).mean()))
            if progress is not None:
                progress(n / self.order)
        return bits

    def _probabilities(self, windows: Keys, lengths: Integers) -> Iterator[tuple[int, Floats]]:
        """For each order, those of the windows' last bytes after the ones before; lengths: bytes a window has."""
        lower = alone = np.full(len(windows), 1 / NUM_BYTES)
        for n, table in enumerate(self._orders, start=1):
            asked, back = np.unique(windows & _mask(n), return_inverse=True)  # sorted: a search goes through the cache
            gram, context = _find(table.keys, asked)[back], _find(table.contexts, asked >> np.uint64(8))[back]
            reaches = lengths >= n
            alone = np.where(reaches, table.occurrences.probability(gram, context, lower), alone)
            lower = np.where(reaches, table.continuations.probability(gram, context, lower), lower)
            yield n, alone


def _count(documents: Sequence[bytes], order: int, tell: Callable[[float], None]) -> list[tuple[Keys, Integers]]:
    """For each length from 1 to order, the distinct n-grams, sorted, and how often each occurs.

    Only the longest are sorted one by one: a shorter n-gram begins a longer one, or ends a document.
    """
    longest = np.concatenate([_grams(text, order) for text in documents])
    tell(0.4)
    longest.sort()
    tell(0.9)
    keys, groups = _runs(longest)
    grams = [(keys, np.diff(groups))]
    for n in range(order - 1, 0, -1):
        ends = np.array([int.from_bytes(text[-n:], "big") for text in documents if len(text) >= n], np.uint64)
        together = np.concatenate([keys >> np.uint64(8), ends])
        counts = np.concatenate([grams[0][1], np.ones(len(ends), np.int64)])
        rank = np.argsort(together, kind="stable")
        keys, groups = _runs(together[rank])
        grams.insert(0, (keys, np.add.reduceat(counts[rank], groups[:-1])))
    return grams


def _grams(text: bytes, n: int) -> Keys:
    """Every run of n bytes."""
    symbols = np.frombuffer(text, np.uint8).astype(np.uint64)
    count = max(len(symbols) - n + 1, 0)
    keys = np.zeros(count, np.uint64)
    for i in range(n):
        keys = (keys << np.uint64(8)) | symbols[i : i + count]
    return keys


def _continuations(keys: Keys, longer: Keys, n: int) -> Integers:
    """How many different bytes come before each n-gram of keys, from the n-grams one byte longer."""
    ends, groups = _runs(np.sort(longer & _mask(n)))
    counts = np.zeros(len(keys), np.int64)
    counts[np.searchsorted(keys, ends)] = np.diff(groups)
    return counts


def _tabulate(counts: Integers, groups: Integers) -> _Counts:
    """groups: where the n-grams of each context begin, and one past the last."""
    D = discounts(counts)
    totals = np.add.reduceat(counts, groups[:-1])
    spared = np.add.reduceat(D[np.minimum(counts, 3)], groups[:-1])
    return _Counts(np.append(counts, 0), np.append(totals, 0), np.append(spared, 0), D)


def _runs(keys: Keys) -> tuple[Keys, Integers]:
    """The distinct ones of sorted keys; where each begins, and one past the last."""
    begins = np.flatnonzero(np.concatenate([np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]]))
    return keys[begins], np.append(begins, len(keys))


def _find(keys: Keys, asked: Keys) -> Integers:
    """Where each one asked for stands among sorted keys, -1 where it does not."""
    if not len(keys):  # no document is that long
        return np.full(len(asked), -1)
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, place, -1)


def _windows_before(documents: Sequence[bytes], order: int) -> tuple[Keys, Integers]:
    """For each byte, itself and the order - 1 before it, and how many of those its document has."""
    windows, lengths = [], []
    for text in documents:
        symbols = np.frombuffer(text, np.uint8).astype(np.uint64)
        words = symbols.copy()
        for i in range(1, min(order, len(symbols))):
            words[i:] |= symbols[: len(symbols) - i] << np.uint64(8 * i)
        windows.append(words)
        lengths.append(np.arange(1, len(symbols) + 1))
    return np.concatenate(windows), np.concatenate(lengths)


def _mask(n: int) -> np.uint64:
    return np.uint64(2 ** (8 * n) - 1)
