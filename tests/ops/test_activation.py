from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.ops.activation import relu2, silu, softplus
from tests.compare import assert_near, double, seeded

Op = Callable[[Tensor], Tensor]
EXTREMES = [-1e4, -745.0, -104.0, -88.8, -88.0, -30.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 20.0, 88.0, 88.8, 104.0, 1e4]


def silu_definition(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def softplus_definition(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def relu2_definition(x: Tensor) -> Tensor:
    return torch.where(x > 0, x * x, 0)


PAIRS = [
    pytest.param(silu, silu_definition, id="silu"),
    pytest.param(softplus, softplus_definition, id="softplus"),
    pytest.param(relu2, relu2_definition, id="relu2"),
]


@pytest.mark.parametrize(("op", "definition"), PAIRS)
def test_values_and_gradients_equal_the_definition(op: Op, definition: Op) -> None:
    x = torch.cat((torch.randn(5000, generator=seeded(0)) * 5, torch.linspace(-20, 20, 999))).requires_grad_()
    exact = double(x)
    got, want = op(x), definition(exact)
    # relative to each value: small ones of softplus are time steps, and matter
    assert ((got - want).abs() <= want.abs() * 1e-6).all()
    (slope,) = torch.autograd.grad(got.sum(), x)
    (wanted,) = torch.autograd.grad(want.sum(), exact)
    assert_near(slope, wanted, 2e-6)  # of silu: x times the rounding of 1 - sigmoid(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "definition"), PAIRS)
def test_extremes_have_finite_values_and_gradients(op: Op, definition: Op, dtype: torch.dtype) -> None:
    x = torch.tensor(EXTREMES).to(dtype).requires_grad_()
    exact = double(x)
    got, want = op(x), definition(exact)
    rounding = 1e-6 if got.dtype == torch.float32 else 2**-8
    # exp(88.7) is the largest in float32: what is below its inverse is zero
    assert ((got - want).abs() <= want.abs() * rounding + 1e-36).all()
    (slope,) = torch.autograd.grad(got.sum(), x)
    (wanted,) = torch.autograd.grad(want.sum(), exact)
    assert slope.dtype == dtype
    assert ((slope - wanted).abs() <= wanted.abs() * (1e-6 if dtype == torch.float32 else 2**-8) + 1e-36).all()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("op", [silu, softplus, relu2])
def test_bits_depend_on_nothing_but_the_value(op: Op, count: int, threads: Callable[[int], None]) -> None:
    """Long enough for several threads, and odd, so that vectors have tails."""
    threads(count)
    x = torch.randn(100_003, generator=seeded(1)) * 4
    whole = op(x)
    for length in (1, 3, 7, 13, 31):
        assert torch.equal(torch.cat([op(part.clone()) for part in x[:2000].split(length)]), whole[:2000])
    for length in (70_003, 70_009, 99_999):  # where threads part the work, and where the last vector ends
        assert torch.equal(op(x[:length].clone()), whole[:length])


def test_dtypes() -> None:
    x = torch.ones(3, dtype=torch.bfloat16)
    assert silu(x).dtype == softplus(x).dtype == torch.float32
    assert relu2(x).dtype == torch.bfloat16


def test_an_upstream_gradient_scales() -> None:
    for op, definition in ((silu, F.silu), (softplus, F.softplus)):
        x = torch.randn(50, generator=seeded(2)).requires_grad_()
        factor = torch.randn(50, generator=seeded(3))
        (got,) = torch.autograd.grad((op(x) * factor).sum(), x)
        (want,) = torch.autograd.grad((definition(x) * factor).sum(), x)
        assert_near(got, want, 1e-6)
