import pytest
import torch

from nemotron_h.ops.rounding import fed_back, nearest
from nemotron_h.precision.weights import MOST_ROWS, ROWS_LIMIT, Met, rounded
from tests.compare import seeded


def met(x: torch.Tensor, *, products: bool = False) -> Met:
    found = Met(products=products)
    for some in x.split(300):
        found.add(some)
    return found


def test_rows_with_a_few_large_numbers_take_16_bits() -> None:
    weight = torch.randn(64, 512, generator=seeded(0)) / 20
    x = torch.randn(100, 512, generator=seeded(1))
    even = rounded(weight, 8, met(x))
    assert even.row_bits == 8
    assert 0 < even.row_error < 0.02
    x[:, 7] *= 300
    weight[:, 7] = 0  # what is large says nothing, and leaves few levels to the rest
    uneven = rounded(weight, 8, met(x))
    assert uneven.row_error > ROWS_LIMIT
    assert uneven.row_bits == 16
    assert uneven.error < 0.02
    assert uneven.error == pytest.approx(uneven.weight_error, abs=0.005)


@pytest.mark.parametrize("bits", [8, 4])
def test_errors_are_those_of_the_products(bits: int) -> None:
    weight = torch.randn(64, 512, generator=seeded(0))
    x = torch.randn(700, 512, generator=seeded(1)).bfloat16()
    found = rounded(weight, bits, met(x))
    exact = x.double() @ weight.double().T
    off = x.double() @ (found.matrix.dense().double() - weight.double()).T
    assert found.weight_error == pytest.approx((off.norm() / exact.norm()).item(), rel=1e-3)
    assert found.error == pytest.approx((found.weight_error**2 + found.row_error**2) ** 0.5, rel=0.05)
    want = nearest(weight, bits)
    assert torch.equal(found.matrix.words, want.words)


def test_with_products_errors_are_fed_back() -> None:
    weight = torch.randn(32, 64, generator=seeded(0))
    x = torch.randn(1500, 64, generator=seeded(1)) @ torch.randn(64, 64, generator=seeded(2))
    seen = met(x, products=True)
    assert seen.products is not None
    torch.testing.assert_close(seen.products, x.double().T @ x.double(), rtol=1e-4, atol=1e-2)
    assert len(seen.rows) == MOST_ROWS
    assert torch.equal(seen.rows, x[:MOST_ROWS])
    found = rounded(weight, 4, seen)
    assert torch.equal(found.matrix.words, fed_back(weight, 4, seen.products).words)
    assert found.weight_error < 0.8 * rounded(weight, 4, met(x)).weight_error
