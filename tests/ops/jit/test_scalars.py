from typing import Any

import numpy as np
import torch

from nemotron_h.ops.jit import scalars
from nemotron_h.ops.jit.compiler import numba
from tests.kernels import need_kernels

need_kernels()


@numba.njit
def _exps(x: Any, out: Any) -> None:
    for i in range(len(x)):
        out[i] = scalars.exp(x[i])


@numba.njit
def _narrowed(x: Any, out: Any) -> None:
    for i in range(len(x)):
        out[i] = scalars.to_bfloat16(x[i])


@numba.njit
def _widened(x: Any, out: Any) -> None:
    for i in range(len(x)):
        out[i] = scalars.from_bfloat16(x[i])


def test_exp_is_within_two_units_in_the_last_place() -> None:
    x = np.linspace(-87.3, 88.3, 400_001, dtype=np.float32)
    got = np.empty_like(x)
    _exps(x, got)
    want = np.exp(x.astype(np.float64))
    assert np.max(np.abs(got - want) / np.spacing(want.astype(np.float32))) <= 2


def test_exp_is_clamped_where_float32_ends() -> None:
    x = np.array([-1e9, -1000, -88, 89, 1e9], np.float32)
    got = np.empty_like(x)
    _exps(x, got)
    assert np.isfinite(got).all()
    assert (got[:3] < 2e-38).all()
    assert (got[3:] > 2e38).all()


def test_bfloat16_rounds_as_torch_does_nan_and_infinity_included() -> None:
    bits = torch.arange(0, 2**32, 65_537 // 3, dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(2**15, dtype=torch.int32) << 16) + 0x8000  # halfway between two neighbours
    x = torch.cat((bits, ties)).view(torch.float32)
    got = np.empty(len(x), np.uint16)
    _narrowed(x.numpy(), got)
    want = x.bfloat16()
    real = ~want.isnan().numpy()
    assert np.array_equal(got[real], want.view(torch.uint16).numpy()[real])
    assert torch.from_numpy(got[~real]).view(torch.bfloat16).isnan().all()


def test_every_bfloat16_widens_exactly() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    want = torch.from_numpy(bits).view(torch.bfloat16).float()
    got = np.empty(len(bits), np.float32)
    _widened(bits, got)
    real = ~want.isnan().numpy()
    assert np.array_equal(got[real], want.numpy()[real])
    assert np.isnan(got[~real]).all()


def test_exponentials_take_the_widest_vectors() -> None:
    _exps(np.zeros(1, np.float32), np.zeros(1, np.float32))
    (text,) = _exps.inspect_llvm().values()
    assert '"prefer-vector-width"="512"' in text
