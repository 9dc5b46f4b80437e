"""A pseudo-random order of n things, one place at a time: no list of them is ever held.

A Feistel network permutes 0 .. 4^k - 1, whatever its round function: it splits a number into halves (left, right) and
repeats (left, right) -> (right, left xor f(right)), which can be undone. To permute 0 .. n - 1 alone, a number that
lands outside goes through the network again until it lands inside (cycle walking): from inside, the walk must return
inside, and two walks never meet. Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
"""

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd: steps of it visit every word


def permute(index: NDArray[np.int64], n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where each index, 0 <= index < n, goes in the order that seed and epoch name: a bijection of 0 .. n - 1."""
    half = max((n - 1).bit_length() + 1, 2) // 2
    keys = _round_keys(seed, epoch)
    places = _feistel(index.astype(np.uint64), half, keys)
    while (outside := places >= np.uint64(n)).any():
        places[outside] = _feistel(places[outside], half, keys)
    return places.astype(np.int64)


def _feistel(places: Words, half: int, keys: Words) -> Words:
    """half: bits of each half."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = places >> shift, places & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << shift) | right


def _round_keys(seed: int, epoch: int) -> Words:
    start = mix(np.array([seed % 2**64], np.uint64)) ^ np.uint64(epoch)
    return mix(mix(start) + np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(GOLDEN))


def mix(x: Words) -> Words:
    """A bijection of 64-bit words that spreads every bit over all (Steele, Lea and Flood 2014, SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
