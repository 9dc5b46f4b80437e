from typing import Any

import numpy as np
import pytest

from nemotron_h.ops.jit import lanes
from nemotron_h.ops.jit.compiler import numba
from tests.kernels import need_kernels

need_kernels()


@numba.njit(error_model="numpy")
def all_three(a: Any, b: Any, first: Any, last: Any) -> Any:
    return lanes.total(a, first, last), lanes.dot(a, b, first, last), lanes.top(a, first, last)


def normal(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1), (3, 18), (0, 16), (5, 37), (1, 1000), (7, 967)])
def test_they_equal_numpys(first: int, last: int) -> None:
    a, b = normal(1000, 0), normal(1000, 1)
    total, dot, top = all_three(a, b, first, last)
    some, other = a[first:last].astype(np.float64), b[first:last].astype(np.float64)
    assert abs(total - some.sum()) < 1e-4
    assert abs(dot - (some * other).sum()) < 1e-4
    assert top == (some.max() if len(some) else -np.inf)


def test_the_largest_is_found_wherever_it_stands() -> None:
    for place in range(40):
        a = -(normal(40, 0) ** 2) - 1
        a[place] = -0.5
        assert all_three(a, a, 0, 40)[2] == np.float32(-0.5)


def test_the_bits_do_not_depend_on_where_a_stretch_begins() -> None:
    a, b = normal(300, 2), normal(300, 3)
    want = all_three(a, b, 0, 200)
    for shift in (1, 3, 16):
        moved = [np.concatenate((normal(shift, 4), values)) for values in (a, b)]
        assert all_three(*moved, shift, shift + 200) == want


def test_what_is_no_number_is_not_lost_from_a_sum() -> None:
    a = normal(40, 5)
    a[20] = np.nan
    assert np.isnan(all_three(a, a, 0, 40)[0])
    assert np.isnan(all_three(a, a, 0, 40)[1])
