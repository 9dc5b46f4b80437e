import pytest
import torch

from nemotron_h.errors import ShapeError
from nemotron_h.ops.activation import relu2
from nemotron_h.ops.attention import keep_rows
from nemotron_h.ops.rows import add, pick
from tests.compare import seeded

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.usefixtures("form")
def test_they_have_torchs_bits(dtype: torch.dtype, rows: int) -> None:
    x, y = (torch.randn(rows, 77, generator=seeded(seed)).to(dtype) for seed in (0, 1))
    x[0, :5] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40])
    for got, want in ((add(x, y), x + y), (relu2(x), torch.relu(x).square())):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit() & ~got.isnan(), want.signbit() & ~want.isnan())
    ids = torch.randint(rows, (9,), generator=seeded(2))
    for into in DTYPES:
        torch.testing.assert_close(pick(x, ids, into), x[ids].to(into), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("form")
def test_with_gradients() -> None:
    x, y = (torch.randn(4, 6, generator=seeded(seed), requires_grad=True) for seed in (0, 1))
    (add(x, y).sum() + relu2(x).sum() + pick(y, torch.tensor([1, 1]), torch.bfloat16).float().sum()).backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, 1 + 2 * x.detach().clamp(min=0))
    assert y.grad.sum(1).tolist() == [6, 18, 6, 6]


def test_refusals() -> None:
    for ids in ([0, 4], [-1]):
        with pytest.raises(ShapeError, match=r"^ids: must lie in 0..3; got"):
            pick(torch.zeros(4, 2), torch.tensor(ids), torch.float32)
    with pytest.raises(ShapeError, match=r"^y: must have shape \(2, 3\); got \(3, 3\)"):
        add(torch.zeros(2, 3), torch.zeros(3, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("form")
def test_new_rows_go_to_their_pages(dtype: torch.dtype) -> None:
    k, v = (torch.randn(7, 2, 3, generator=seeded(seed)).to(dtype) for seed in (0, 1))
    pages, places = torch.tensor([2, 2, 0, 4, 4]), torch.tensor([254, 255, 0, 17, 18])
    keys, values = torch.zeros(5, 2, 3, 256, dtype=dtype), torch.zeros(5, 2, 256, 3, dtype=dtype)
    keep_rows(k, v, pages, places, keys, values)
    for row, (page, place) in enumerate(zip(pages.tolist(), places.tolist(), strict=True)):
        assert torch.equal(keys[page, :, :, place], k[row])
        assert torch.equal(values[page, :, place], v[row])
    assert keys.count_nonzero() == k[:5].count_nonzero()
