import pytest
import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.ops import rounding as room
from nemotron_h.ops.jit.nibbles import GROUP, SCALES
from nemotron_h.ops.quantized import Matrix
from nemotron_h.ops.rounding import fed_back, nearest
from tests.compare import seeded


def drawn(outs: int, ins: int, seed: int = 0) -> Tensor:
    """Weights, some columns larger, some rows smaller."""
    generator = seeded(seed)
    weight = torch.randn(outs, ins, generator=generator) * (1 + 3 * torch.rand(ins, generator=generator) ** 4)
    return weight * torch.rand(outs, 1, generator=generator)


def error(matrix: Matrix, weight: Tensor, worth: Tensor | None = None) -> float:
    """Over the norm of the weights."""
    worth = torch.ones(weight.shape[1]) if worth is None else worth
    off = (worth * (matrix.dense().double() - weight.double()).square()).sum()
    return (off / (worth * weight.double().square()).sum()).sqrt().item()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("outs", "ins"), [(70, 300), (1, 1), (5, 17), (64, 1024)])
def test_the_kernel_finds_what_the_definition_does(
    bits: int, outs: int, ins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, worth = drawn(outs, ins), torch.rand(ins, generator=seeded(1))
    rows = torch.randn(200, ins, generator=seeded(2)).double()
    products = rows.T @ rows
    ways = [
        lambda: nearest(weight, bits),
        lambda: nearest(weight, bits, worth),
        lambda: fed_back(weight, bits, products),
    ]
    got = [way() for way in ways]
    monkeypatch.setattr(room, "runs", lambda *tensors: False)
    for one, want in zip(got, [way() for way in ways], strict=True):
        same = (one.integers() == want.integers()).double().mean().item()
        assert same > 0.999
        assert error(one, weight) == pytest.approx(error(want, weight), rel=1e-4, abs=1e-6)


def test_8_bits_take_the_best_of_the_candidates() -> None:
    weight, worth = drawn(3, 40), torch.rand(40, generator=seeded(1))
    got = nearest(weight, 8, worth)
    for row, scale in zip(weight, got.scale.tolist(), strict=False):
        steps = [row.abs().max().item() / 127 * (1 - 0.3 * k / 15) for k in range(16)]
        errors = [(worth * (row - (row / s).round().clamp(-127, 127) * s).square()).sum().item() for s in steps]
        assert scale == pytest.approx(steps[errors.index(min(errors))], rel=1e-5)
    wide = drawn(64, 4096)
    assert error(nearest(wide, 8), wide) < 0.02


def test_4_bits_take_the_nearest_codes_under_each_scale() -> None:
    """No other scale of a group, no other code, and no other scale of the row is nearer."""
    weight = drawn(4, 64)
    matrix = nearest(weight, 4)
    codes, groups = matrix.codes()
    for o, row in enumerate(weight.double()):
        scale = matrix.scale[o].double()
        for g in range(len(row) // GROUP):
            some = row[g * GROUP : (g + 1) * GROUP]
            steps = torch.tensor(SCALES).double() * scale
            near = (some / steps[:, None]).round().clamp(-8, 7)
            errors = (some - near * steps[:, None]).square().sum(1)
            taken = (codes[o, g * GROUP : (g + 1) * GROUP].double() - 8) * SCALES[int(groups[o, g])] * scale
            # the row's scale moves once more after its codes are chosen: by little
            assert (some - taken).square().sum() <= errors.min() * 1.05 + 1e-12
        integers = matrix.integers()[o].double()
        assert scale.item() == pytest.approx((row @ integers / (integers @ integers)).item(), rel=1e-4)


def test_4_bits_are_nearer_than_32_a_scale_of_16_bits() -> None:
    """Blocks of 32 codes and a float16 scale, the largest weight at -8: 4.5 bits, against 4.25."""
    for weight in (torch.randn(64, 2048, generator=seeded(0)), drawn(64, 2048)):
        blocks = weight.view(64, -1, 32)
        largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
        scale = (largest / -8).half().float()
        other = ((blocks / scale + 8.5).floor().clamp(0, 15) - 8) * scale
        assert error(nearest(weight, 4), weight) < 0.93 * ((other - blocks).norm() / weight.norm()).item()


@pytest.mark.parametrize(("bits", "gain"), [(8, 0.8), (4, 0.8)])
def test_error_feedback_brings_products_nearer(bits: int, gain: float) -> None:
    mix = torch.randn(256, 256, generator=seeded(3)) / 16
    rows = torch.randn(2000, 256, generator=seeded(4)) @ (mix + torch.eye(256) * 0.3)
    seen, others = rows[:1500], rows[1500:]
    weight = drawn(100, 256)
    plain, fed = nearest(weight, bits), fed_back(weight, bits, seen.double().T @ seen.double())
    far = [(others @ (m.dense() - weight).T).norm().item() for m in (plain, fed)]
    assert far[1] < gain * far[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_error_feedback_is_its_definition(bits: int) -> None:
    """One column after another in float64, each error spread over what is left by the inverse of what is left of H."""
    ins, outs = 3 * GROUP + 5, 7
    weight = drawn(outs, ins).double()
    rows = torch.randn(400, ins, generator=seeded(5)).double()
    products = rows.T @ rows
    got = fed_back(weight.float(), bits, products)
    damped = products + torch.eye(ins).double() * products.diagonal().mean() * room.DAMPING
    left, integers = weight.clone(), torch.zeros(outs, ins)
    scale, places = got.scale[:outs].double(), got.codes()[1].long() if bits == 4 else None
    inverse = torch.linalg.inv(damped)
    for j in range(ins):
        step = scale if places is None else scale * torch.tensor(SCALES).double()[places[:, j // GROUP]]
        low, high = (-127, 127) if bits == 8 else (-8, 7)
        code = (left[:, j] / step).round().clamp(low, high)
        integers[:, j] = code * (step / scale)
        off = (left[:, j] - code * step) / inverse[j, j]
        left -= off[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    assert (integers.round() != got.integers()).double().mean() < 0.01


def test_nothing_and_what_is_too_small_is_nothing() -> None:
    weight = drawn(6, 40)
    weight[1] = 0
    weight[2] *= 1e-36
    weight[:, 3] = 0
    for bits in (8, 4):
        for matrix in (nearest(weight, bits), fed_back(weight, bits, torch.zeros(40, 40).double())):
            assert matrix.scale.isfinite().all()
            assert not matrix.dense()[1:3].any()
            assert error(matrix, weight) < (0.02 if bits == 8 else 0.1)


def test_large_matrices_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(50, 64)
    for bits in (8, 4):
        want = nearest(weight, bits)
        with monkeypatch.context() as patch:
            patch.setattr(room, "AT_ONCE", 64 * 7)
            again = nearest(weight, bits)
        assert torch.equal(again.words, want.words)
        assert torch.equal(again.scale, want.scale)


def test_what_cannot_be_rounded_is_refused() -> None:
    weight = drawn(4, 32)
    weight[2, 5] = float("nan")
    for bits in (8, 4):
        with pytest.raises(
            ShapeError, match=r"^weight: must hold finite numbers, to be rounded to integers; got others"
        ):
            nearest(weight, bits)
    with pytest.raises(ShapeError, match=r"^bits: must be 8 or 4; got 3"):
        nearest(drawn(4, 32), 3)
    with pytest.raises(ShapeError, match=r"^products: must have shape \(32, 32\)"):
        fed_back(drawn(4, 32), 4, torch.zeros(3, 3).double())
    with pytest.raises(ShapeError, match=r"^products: must be finite"):
        fed_back(drawn(4, 32), 4, torch.full((32, 32), float("inf")).double())
