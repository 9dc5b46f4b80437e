import math

import pytest
import torch

from nemotron_h.errors import ShapeError
from nemotron_h.ops.rounding import fed_back, nearest
from nemotron_h.precision import weights
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


def test_a_large_row_does_not_hide_what_happens_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first token of a text is, in trained models."""
    monkeypatch.setattr(weights, "AT_ONCE", 24)  # outputs that do not divide them
    weight = torch.randn(64, 512, generator=seeded(0)) / 20
    weight[:, 7] = 0
    x = torch.randn(100, 512, generator=seeded(1))
    x[1:, 7] *= 300
    x[0] *= 10_000
    found = rounded(weight, 8, met(x))
    assert found.row_error > ROWS_LIMIT
    assert found.row_bits == 16
    x[50] = 0
    assert rounded(weight, 8, met(x)).row_error == pytest.approx(found.row_error, rel=0.05)
    assert rounded(weight, 8, met(torch.zeros(3, 512))).error == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_no_numbers_are_refused(bad: float) -> None:
    x = torch.ones(4, 32)
    x[2, 3] = bad
    with pytest.raises(ShapeError, match=r"^rows: must be finite, to be rounded for; the text gives infinity"):
        rounded(torch.ones(8, 32), 8, met(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_errors_are_those_of_the_products(bits: int) -> None:
    weight = torch.randn(64, 512, generator=seeded(0))
    x = torch.randn(700, 512, generator=seeded(1)).bfloat16()
    found = rounded(weight, bits, met(x))
    exact = x.double() @ weight.double().T
    off = x.double() @ (found.matrix.dense().double() - weight.double()).T
    assert found.weight_error == pytest.approx(
        (off.norm(dim=1) / exact.norm(dim=1)).square().mean().sqrt().item(), rel=1e-3
    )
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
