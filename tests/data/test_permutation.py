from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h.data.permutation import permute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 257, 1000, 4099, 65_537])
def test_every_place_comes_once(n: int) -> None:
    order = permute(np.arange(n), n, seed=3, epoch=2)
    assert np.array_equal(np.sort(order), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40))
def test_any_seed_and_epoch_permutes(n: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(n), n, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(order), np.arange(n))


def test_one_place_alone_equals_all_at_once() -> None:
    n = 1009
    together = permute(np.arange(n), n, seed=1, epoch=0)
    alone = [int(permute(np.array([i]), n, seed=1, epoch=0)[0]) for i in range(0, n, 37)]
    assert alone == together[::37].tolist()


def test_seed_and_epoch_name_the_order() -> None:
    orders = {
        (seed, epoch): tuple(permute(np.arange(100), 100, seed=seed, epoch=epoch).tolist())
        for seed in range(8)
        for epoch in range(8)
    }
    assert len(set(orders.values())) == 64


@pytest.mark.parametrize("n", [2, 5, 11])
def test_each_pair_of_first_places_is_as_likely_as_any(n: int) -> None:
    trials = 3000
    pairs = Counter(tuple(permute(np.arange(2), n, seed=seed, epoch=1).tolist()) for seed in range(trials))
    expected = trials / (n * (n - 1))
    chi_square = sum((pairs[i, j] - expected) ** 2 / expected for i in range(n) for j in range(n) if i != j)
    freedom = n * (n - 1) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations of the chi-square law


def test_neighbours_are_torn_apart() -> None:
    n = 10_000
    order = permute(np.arange(n), n, seed=0, epoch=0)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.05  # five standard deviations: 1 / sqrt(n) each
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
