import random

import numpy as np
import pytest

from nemotron_h.data import shingles
from nemotron_h.data.shingles import NearCopy, near_copies, overlap, sketch


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def test_overlap_counts_the_shingles_held() -> None:
    a = noise(1, 1000)
    assert overlap(a, noise(2, 50) + a + noise(3, 5000)) == 1
    assert overlap(a, noise(2, 5000)) == 0
    assert overlap(a, a[:500]) == (500 - 31) / (1000 - 31)
    assert overlap(b"short", b"short") == 1


@pytest.mark.parametrize("kept", [0.0, 0.25, 0.6, 0.9, 1.0])
def test_estimate_equals_the_definition(kept: float) -> None:
    held_out = noise(1, 40_000)
    train = noise(2, 3000) + held_out[: int(kept * len(held_out))] + noise(3, 9000)
    found = near_copies([("a", held_out)], [("other", noise(4, 40_000)), ("b", train)], 1e-9)
    estimate = found[0].overlap_fraction if found else 0.0
    # 5,000 shingles sampled: five standard deviations of a fraction
    assert abs(estimate - overlap(held_out, train)) < 5 * (0.25 / 5000) ** 0.5


def test_every_shingle_sampled_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shingles, "SAMPLED", 1.0000000001)
    held_out, train = noise(1, 700), noise(2, 33) + noise(1, 700)[100:400] * 2
    [copy] = near_copies([("a", held_out)], [("b", train)], 0.1)
    assert copy.overlap_fraction == round(overlap(held_out, train), 3)


def test_the_nearest_is_named_and_nearest_come_first() -> None:
    a, b = noise(1, 9000), noise(2, 9000)
    train = [("half", a[:6000]), ("most", a[:8000]), ("all_of_b", noise(3, 100) + b), ("none", noise(4, 9000))]
    copies = near_copies([("a", a), ("c", noise(5, 9000)), ("b", b)], train, 0.5)
    assert [(copy.path, copy.near) for copy in copies] == [("b", "all_of_b"), ("a", "most")]
    assert copies[0] == NearCopy("b", "all_of_b", 1.0)
    assert near_copies([("a", a)], train, 0.95) == []
    assert near_copies([], train, 0.5) == []


def test_a_run_of_bytes_has_the_same_hash_wherever_it_stands() -> None:
    run = noise(7, 2000)
    inside = sketch(noise(8, 333) + run + noise(9, 77))
    assert len(sketch(run)) > 100
    assert np.isin(sketch(run), inside).all()


def test_progress_ends_at_one() -> None:
    told: list[float] = []
    near_copies([("a", b"a" * 99)], [("b", b"b"), ("c", b"c")], 0.5, progress=told.append)
    assert told == [0.5, 1.0]
