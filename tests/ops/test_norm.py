import pytest
import torch
from torch import Tensor

from nemotron_h.errors import ShapeError, UnsupportedError
from nemotron_h.ops.norm import gated_rms_norm, rms_norm
from tests.compare import assert_near, double, seeded

EPSILON = 1e-5
ROUNDING = 2e-6  # float32: a sum of squares in partial sums, a square root, an exp


def rms_norm_definition(x: Tensor, gain: Tensor, epsilon: float = EPSILON) -> Tensor:
    return gain * x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon)


def gated_definition(y: Tensor, z: Tensor, gain: Tensor, groups: int, epsilon: float = EPSILON) -> Tensor:
    """The gate, then the norm of each group, then the gain."""
    gated = (y * z * torch.sigmoid(z)).unflatten(-1, (groups, -1))
    return rms_norm_definition(gated, torch.ones((), dtype=y.dtype), epsilon).flatten(-2) * gain


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


@pytest.mark.parametrize("rows", [1, 3, 63, 64, 65, 130])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 48, 80])
@pytest.mark.usefixtures("form")
def test_norm_and_its_gradients_equal_the_definition(rows: int, width: int) -> None:
    leaves = [(values(rows, width, seed=1) * 3).requires_grad_(), values(width, seed=2).requires_grad_()]
    factor = values(rows, width, seed=3)
    out = rms_norm(*leaves, EPSILON)
    exact = [double(t) for t in leaves]
    want = rms_norm_definition(*exact)
    assert_near(out.detach(), want.detach(), ROUNDING)
    # of one channel alone, what is left of the gradient is epsilon's share: rounding of terms that cancel
    allowed = 1e-5 if width > 1 else 1e-1
    got = torch.autograd.grad((out * factor).sum(), leaves)
    wanted = torch.autograd.grad((want * factor).sum(), exact)
    for name, value, exact_value, fraction in zip(("x", "gain"), got, wanted, (allowed, 1e-5), strict=True):
        assert_near(value, exact_value, fraction, name)


@pytest.mark.parametrize("rows", [1, 64, 65, 130])
@pytest.mark.parametrize(("width", "groups"), [(16, 1), (48, 2), (48, 3), (80, 8), (84, 4)])
@pytest.mark.usefixtures("form")
def test_gated_norm_and_its_gradients_equal_the_definition(rows: int, width: int, groups: int) -> None:
    leaves = [t.requires_grad_() for t in (values(rows, width, seed=4) * 2, values(rows, width, seed=5))]
    leaves.append(values(width, seed=6).requires_grad_())
    factor = values(rows, width, seed=7)
    out = gated_rms_norm(*leaves, groups, EPSILON)
    exact = [double(t) for t in leaves]
    want = gated_definition(*exact, groups)
    assert_near(out.detach(), want.detach(), ROUNDING)
    got = torch.autograd.grad((out * factor).sum(), leaves)
    wanted = torch.autograd.grad((want * factor).sum(), exact)
    for name, value, exact_value in zip(("y", "z", "gain"), got, wanted, strict=True):
        assert_near(value, exact_value, 1e-5, name)


@pytest.mark.usefixtures("form")
def test_bfloat16_is_rounded_once_at_the_end() -> None:
    x, gain = (values(7, 48, seed=8) * 5).bfloat16(), values(48, seed=9).bfloat16()
    out = rms_norm(x, gain, EPSILON)
    assert out.dtype == torch.bfloat16
    exact = rms_norm_definition(x.double(), gain.double())
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01).all()  # half a unit of eight bits
    y, z = values(7, 48, seed=10), x
    gated = gated_rms_norm(y, z, gain, 2, EPSILON)
    assert gated.dtype == torch.bfloat16
    exact = gated_definition(y.double(), z.double(), gain.double(), 2)
    assert ((gated.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01 + 1e-6).all()


@pytest.mark.usefixtures("form")
def test_bfloat16_gradients() -> None:
    y = values(130, 48, seed=11).requires_grad_()
    z, gain = values(130, 48, seed=12).bfloat16().requires_grad_(), values(48, seed=13).bfloat16().requires_grad_()
    factor = values(130, 48, seed=14).bfloat16()
    for op, definition, leaves in (
        (lambda x, w: rms_norm(x, w, EPSILON), rms_norm_definition, [z, gain]),
        (lambda *t: gated_rms_norm(*t, 3, EPSILON), lambda *t: gated_definition(*t, 3), [y, z, gain]),
    ):
        got = torch.autograd.grad((op(*leaves) * factor).sum(), leaves)
        exact = [double(t) for t in leaves]
        for leaf, value, wanted in zip(
            leaves, got, torch.autograd.grad((definition(*exact) * factor).sum(), exact), strict=True
        ):
            assert value.dtype == leaf.dtype
            assert_near(value, wanted, 2**-8)


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e4])
@pytest.mark.usefixtures("form")
def test_zeros_and_extremes_stay_finite(size: float) -> None:
    leaves = [t.requires_grad_() for t in (values(5, 32, seed=15) * size, values(5, 32, seed=16) * size)]
    leaves.append(torch.ones(32, requires_grad=True))
    exact = [double(t) for t in leaves]
    out, want = gated_rms_norm(*leaves, 2, EPSILON), gated_definition(*exact, 2)
    assert_near(out.detach(), want.detach(), ROUNDING)
    plain, wanted = rms_norm(leaves[0], leaves[2], EPSILON), rms_norm_definition(exact[0], exact[2])
    assert_near(plain.detach(), wanted.detach(), ROUNDING)
    got = torch.autograd.grad(out.square().sum() + plain.sum(), leaves)
    for value, exact_value in zip(got, torch.autograd.grad(want.square().sum() + wanted.sum(), exact), strict=True):
        # v / |v| has next to no gradient where v is far above epsilon: rounding of terms that cancel
        if size < 1e4:
            assert_near(value, exact_value, 1e-4)
        assert value.isfinite().all()


@pytest.mark.usefixtures("form")
def test_a_rows_bits_depend_on_nothing_but_the_row() -> None:
    y, z, gain = values(129, 48, seed=17), values(129, 48, seed=18), values(48, seed=19)
    whole, gated = rms_norm(z, gain, EPSILON), gated_rms_norm(y, z, gain, 3, EPSILON)
    for row in (0, 63, 64, 128):
        assert torch.equal(rms_norm(z[row : row + 1], gain, EPSILON)[0], whole[row])
        part = slice(row, row + 1)
        assert torch.equal(gated_rms_norm(y[part], z[part], gain, 3, EPSILON)[0], gated[row])


def test_wrong_shapes_are_refused_by_name() -> None:
    x, gain = torch.zeros(4, 8), torch.zeros(8)
    with pytest.raises(ShapeError, match=r"^gain: must have shape .*8.*; got \(9,\)"):
        rms_norm(x, torch.zeros(9), EPSILON)
    with pytest.raises(ShapeError, match=r"^gain: must have shape"):
        gated_rms_norm(x, x, torch.zeros(4), 2, EPSILON)
    with pytest.raises(ShapeError, match=r"^y: must have shape"):
        gated_rms_norm(torch.zeros(3, 8), x, gain, 2, EPSILON)
    with pytest.raises(ShapeError, match=r"^y: must be torch\.float32; got torch\.bfloat16"):
        gated_rms_norm(x.bfloat16(), x, gain, 2, EPSILON)


@pytest.mark.parametrize("groups", [0, 3, 11])
@pytest.mark.usefixtures("form")
def test_groups_that_do_not_divide_the_channels_are_refused(groups: int) -> None:
    with pytest.raises(ShapeError, match=f"^num_groups: must divide the 10 channels; got {groups}$"):
        gated_rms_norm(torch.zeros(2, 10), torch.zeros(2, 10), torch.ones(10), groups, EPSILON)


@pytest.mark.usefixtures("form")
def test_other_than_rows_of_channels_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"^x: must have shape"):
        rms_norm(torch.zeros(2, 3, 10), torch.ones(10), EPSILON)
    with pytest.raises(ShapeError, match=r"^z: must have shape"):
        gated_rms_norm(torch.zeros(2, 3, 10), torch.zeros(2, 3, 10), torch.ones(10), 2, EPSILON)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
@pytest.mark.usefixtures("form")
def test_a_nan_stays_one_in_bfloat16(bits: int) -> None:
    y = torch.zeros(1, 16)
    y[0, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out = gated_rms_norm(y, torch.ones(1, 16, dtype=torch.bfloat16), torch.ones(16), 1, EPSILON)
    assert out.isnan().all()


def test_a_gradient_of_a_gradient_is_refused_rather_than_nothing() -> None:
    x = values(4, 16, seed=7).requires_grad_()
    with pytest.raises(UnsupportedError, match=r"^create_graph: must be False"):
        torch.autograd.grad(rms_norm(x, torch.ones(16), EPSILON).sum(), x, create_graph=True)
