from typing import Any

import numpy as np
import pytest
import torch

from nemotron_h.ops.jit import tiles
from nemotron_h.ops.jit.compiler import numba
from nemotron_h.ops.jit.pairs import ADDS_PAIRS, load_pairs
from nemotron_h.ops.jit.scalars import array
from tests.kernels import need_kernels

need_kernels()


@numba.njit(error_model="numpy")
def product(
    out: Any, begin: Any, end: Any, width: Any, factors: Any, column: Any, rows: Any, first: Any, count: Any
) -> None:
    tiles.add_product(out, begin, end, width, factors, column, rows, first, count)


@numba.njit(error_model="numpy")
def turned_product(out: Any, factors: Any, rows: Any) -> None:
    tiles.add_product(out, 0, out.shape[0], out.shape[1], factors.T, 0, rows, 0, rows.shape[0])


@numba.njit(error_model="numpy")
def pairs_of(words: Any, rows: Any) -> None:
    load_pairs(words, rows, 0, 0, words.shape[0], words.shape[1])


@numba.njit(error_model="numpy")
def causal_product(out: Any, begin: Any, end: Any, factors: Any, rows: Any, first: Any) -> None:
    tiles.add_causal_product(out, begin, end, factors, rows, first)


def normal(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 40, 64, 80])
@pytest.mark.parametrize("height", [1, 3, 4, 7, 64])
def test_products_equal_numpys(height: int, width: int) -> None:
    out, factors, rows = normal(height, width), normal(height, 33), normal(50, width)
    got = out.copy()
    product(got, 0, height, width, factors, 2, rows, 5, 31)
    want = out + factors[:, 2:33].astype(np.float64) @ rows[5:36].astype(np.float64)
    assert np.allclose(got, want, rtol=0, atol=1e-5)
    got = np.zeros_like(out)
    turned_product(got, normal(20, height), normal(20, width))
    assert np.allclose(got, normal(20, height).T @ normal(20, width), rtol=0, atol=1e-5)


@pytest.mark.skipif(not ADDS_PAIRS, reason="this CPU does not add the products of pairs")
@pytest.mark.parametrize("width", [1, 16, 17, 64, 83])
@pytest.mark.parametrize("height", [1, 4, 7])
def test_products_of_pairs_equal_torchs(height: int, width: int) -> None:
    factors, rows = (torch.from_numpy(t).bfloat16() for t in (normal(height, 34), normal(34, width)))
    words = np.empty((17, width), np.uint32)
    pairs_of(words, array(rows))
    out = normal(height, width)
    got = out.copy()
    product(got, 0, height, width, array(factors).view(np.uint32), 1, words, 1, 16)
    want = torch.from_numpy(out).double() + factors[:, 2:].double() @ rows[2:].double()
    assert np.allclose(got, want.numpy(), rtol=0, atol=2e-5)
    for i in range(height):
        alone = out[i : i + 1].copy()
        product(alone, 0, 1, width, array(factors)[i : i + 1].view(np.uint32), 1, words, 1, 16)
        assert np.array_equal(alone[0], got[i])


def test_only_the_rows_and_columns_asked_for_are_touched() -> None:
    out = normal(9, 40)
    got = out.copy()
    product(got, 2, 7, 20, normal(9, 8), 0, normal(8, 40), 0, 8)
    assert np.array_equal(got[:2], out[:2])
    assert np.array_equal(got[7:], out[7:])
    assert np.array_equal(got[:, 20:], out[:, 20:])
    assert (got[2:7, :20] != out[2:7, :20]).all()


@pytest.mark.parametrize("width", [16, 40, 80])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(width: int) -> None:
    factors, rows = normal(11, 64), normal(64, width)
    whole = np.zeros((11, width), np.float32)
    product(whole, 0, 11, width, factors, 0, rows, 0, 64)
    for i in range(11):
        alone = np.zeros((11, width), np.float32)
        product(alone, i, i + 1, width, factors, 0, rows, 0, 64)
        assert np.array_equal(alone[i], whole[i])


def test_a_causal_product_reads_nothing_later_and_has_one_rows_bits() -> None:
    factors, rows = normal(30, 64), normal(64, 40)
    rows[45:] = np.nan  # after the last query's own place
    whole = np.zeros((30, 40), np.float32)
    causal_product(whole, 0, 30, factors, rows, 15)
    want = [factors[i, : 16 + i].astype(np.float64) @ rows[: 16 + i].astype(np.float64) for i in range(30)]
    assert np.allclose(whole, np.array(want), rtol=0, atol=1e-5)
    for i in range(30):
        alone = np.zeros((30, 40), np.float32)
        causal_product(alone, i, i + 1, factors, rows, 15)
        assert np.array_equal(alone[i], whole[i])
