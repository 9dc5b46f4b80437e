"""Near copies: held-out documents most of whose text one training document holds too.

A document is the set of its shingles, all runs of 32 bytes. overlap(a, b) is the fraction of a's shingles that b holds:
it asks whether a was already seen, so it is not symmetric, and a short text inside a long one counts in full.
Shingles are hashed, and long documents stand for themselves by the hashes under a bound, the same for all: a sample
that both sides of a comparison draw alike. Source: Broder 1997, "On the resemblance and containment of documents".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemotron_h.data.permutation import mix

SHINGLE_BYTES = 32
SAMPLED = 8  # one hash in so many
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class NearCopy:
    """path: a held-out document; near: the training document that holds this fraction of its shingles."""

    path: str
    near: str
    overlap_fraction: float


def overlap(a: bytes, b: bytes) -> float:
    """The fraction of a's shingles that b holds: the definition, over all of them. A shorter text is one shingle."""
    sets = [{text[i : i + SHINGLE_BYTES] for i in range(max(len(text) - SHINGLE_BYTES, 0) + 1)} for text in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0])


def near_copies(
    held_out: Sequence[tuple[str, bytes]],
    train: Sequence[tuple[str, bytes]],
    fraction: float,
    *,
    progress: Callable[[float], None] | None = None,
) -> list[NearCopy]:
    """The held-out documents whose estimated overlap with some training document is at least fraction, nearest first.

    Documents are (path, content). Those with no hash under the bound, a few hundred bytes at most, are not judged.
    """
    sketches = [sketch(content) for _, content in held_out]
    owners = np.repeat(np.arange(len(sketches)), [len(hashes) for hashes in sketches])
    hashes = np.concatenate(sketches) if sketches else np.empty(0, np.uint64)
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    sizes = np.array([max(len(sketch), 1) for sketch in sketches])
    best, nearest = np.zeros(len(sketches)), np.zeros(len(sketches), np.int64)
    for index, (_, content) in enumerate(train):
        there = sketch(content)
        first, after = np.searchsorted(hashes, there, "left"), np.searchsorted(hashes, there, "right")
        hit = np.flatnonzero(after > first)
        shared = [owners[i:j] for i, j in zip(first[hit], after[hit], strict=True)]
        if shared:
            overlaps = np.bincount(np.concatenate(shared), minlength=len(sketches)) / sizes
            nearer = overlaps > best
            best[nearer], nearest[nearer] = overlaps[nearer], index
        if progress is not None:
            progress((index + 1) / len(train))
    copies = [
        NearCopy(held_out[i][0], train[nearest[i]][0], round(float(best[i]), 3))
        for i in np.flatnonzero(best >= fraction).tolist()
    ]
    return sorted(copies, key=lambda copy: (-copy.overlap_fraction, copy.path))


def sketch(content: bytes) -> Hashes:
    """The distinct hashes of content's shingles that lie under the bound, sorted."""
    hashes = _shingle_hashes(content)
    return np.unique(hashes[hashes < np.uint64(2**64 // SAMPLED)])


def _shingle_hashes(content: bytes) -> Hashes:
    """One hash for each run of 32 bytes, by doubling: 8 bytes fit a word, a pair of words is mixed into one."""
    runs = np.frombuffer(content.ljust(SHINGLE_BYTES, b"\0"), np.uint8).astype(np.uint64)
    for width in (1, 2, 4):
        runs = (runs[:-width] << np.uint64(8 * width)) | runs[width:]
    for width in (8, 16):
        mixed = mix(runs)
        runs = mixed[:-width] * np.uint64(3) + mixed[width:]
    return mix(runs)
