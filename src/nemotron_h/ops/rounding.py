"""The integers that stand for a matrix with the least error, in 8 bits and in 4 (`ops/quantized.py`).

    error[o] = sum_i worth[i] (W[o, i] - scale[o] integers[o, i])^2        worth: of an error at input i, 1 by itself

8 bits: of 16 scales, from the one that reaches the row's largest weight down, the one with the least error. 4 bits: of
some scales, each group of inputs taking the nearest of SCALES and codes, the one with the least error; then twice the
better of the two halves given the other: the scale is the least squares one, and the codes are nearest anew.

With error feedback the inputs are rounded one after another, and each takes the errors before it into account: what is
least is then the error of the products with rows x, given H = x^T x (GPTQ: Frantar et al. 2022, arXiv:2210.17323).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.ops.jit import rounding as jit
from nemotron_h.ops.jit.compiler import runs
from nemotron_h.ops.jit.nibbles import GROUP, SCALES
from nemotron_h.ops.jit.scalars import LANES, array, f
from nemotron_h.ops.quantized import LEAST, Matrix
from nemotron_h.ops.shapes import expect

FACTORS_8 = torch.linspace(1, 0.7, LANES)
FACTORS_4 = torch.linspace(0.7, 1.1, 8)
AT_ONCE = 2**22  # weights that are looked at together: some float32 copies of them are held
COLUMNS = 128  # of one round of error feedback, a multiple of GROUP
DAMPING = 0.01  # of the mean of H's diagonal, added to it: else noise decides where few rows were seen


def nearest(weight: Tensor, bits: int, worth: Tensor | None = None) -> Matrix:
    """weight (outs, ins) any float, finite; worth (ins,), 1 where None. bits: 8 or 4.

    Raises: ShapeError for another number of bits, or a weight that is no finite number.
    """
    ins = weight.shape[1]
    given = torch.ones(ins, device=weight.device) if worth is None else worth.float()
    expect(given, "worth", (ins,), torch.float32)
    some = {8: _nearest_8, 4: _nearest_4}.get(bits)
    if some is None:
        raise ShapeError(f"bits: must be 8 or 4; got {bits}")
    parts = [some(_wide(part), given) for part in weight.split(max(1, AT_ONCE // ins))]
    return _matrix(bits, [torch.cat(own) for own in zip(*parts, strict=True)])


def fed_back(weight: Tensor, bits: int, products: Tensor) -> Matrix:
    """The same with error feedback: products (ins, ins) float64 = x^T x of the rows x that the matrix meets.

    Raises: ShapeError as `nearest`, and for products that are not finite.
    """
    outs, ins = weight.shape
    expect(products, "products", (ins, ins), torch.float64)
    if not products.isfinite().all():
        raise ShapeError("products: must be finite; the rows they are of hold infinity, or what is no number")
    worth = products.diagonal().clamp(min=products.diagonal().mean() * DAMPING).float()
    scale = nearest(weight, bits, worth if worth.any() else None).scale[:outs]
    left = torch.cat([_wide(part) for part in weight.split(max(1, AT_ONCE // ins))])
    upper = _upper(products)
    parts = []
    for first in range(0, ins, COLUMNS):
        columns = slice(first, min(first + COLUMNS, ins))
        *found, error = _columns(left[:, columns].contiguous(), upper[columns, columns].contiguous(), scale, bits)
        left[:, columns.stop :] -= error @ upper[columns, columns.stop :]
        parts.append(found)
    return _matrix(bits, [*(torch.cat(own, 1) for own in zip(*parts, strict=True)), scale])


def _upper(products: Tensor) -> Tensor:
    """U float32 with U^T U the inverse of the damped products. Where no row was seen every error is worth the same."""
    mean = products.diagonal().mean()
    damped = products + torch.eye(len(products), dtype=torch.float64, device=products.device) * (
        mean * DAMPING if mean > 0 else 1
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()


def _columns(weight: Tensor, upper: Tensor, scale: Tensor, bits: int) -> list[Tensor]:
    """weight (outs, columns) float32, written over: integers int8, or codes and groups, and what the columns after
    these take over of each one's error, float32 (outs, columns)."""
    outs, columns = weight.shape
    integers, error = weight.new_empty(outs, columns, dtype=torch.int8), torch.empty_like(weight)
    groups = weight.new_zeros(outs, -(-columns // GROUP), dtype=torch.uint8)
    if runs(weight):
        arrays = (array(t) for t in (weight, upper, scale))
        jit.fed_back(outs, *arrays, bits == 4, integers.numpy(), groups.numpy(), array(error))
    else:
        fed_back_torch(weight, upper, scale, bits, integers, groups, error)
    return [integers, error] if bits == 8 else [(integers + 8).to(torch.uint8), groups, error]


def fed_back_torch(
    weight: Tensor, upper: Tensor, scale: Tensor, bits: int, integers: Tensor, groups: Tensor, error: Tensor
) -> None:
    """The kernel's work in torch: where there is no kernel, and beside the kernel in tests."""
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    worth = upper.diagonal().reciprocal().square()
    step = scale
    for j in range(weight.shape[1]):
        if bits == 4 and j % GROUP == 0:
            some = weight[:, None, j : j + GROUP]
            *_, place = _of_scales(some, worth[None, j : j + GROUP], scale)
            groups[:, j // GROUP] = place[:, 0]
            step = scale * _scales(weight.device)[place[:, 0]]
        code = (weight[:, j] / step).nan_to_num().round().clamp(low, high)
        integers[:, j] = code
        error[:, j] = (weight[:, j] - code * step) / upper[j, j]
        weight[:, j + 1 :] -= error[:, j, None] * upper[j, j + 1 :]


def _nearest_8(weight: Tensor, worth: Tensor) -> tuple[Tensor, Tensor]:
    if not runs(weight):
        return nearest_8_torch(weight, worth)
    integers, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    arrays = (array(t) for t in (weight, worth, FACTORS_8))
    jit.nearest_8(len(weight), *arrays, f(127), integers.numpy(), array(scale))
    return integers, scale


def nearest_8_torch(weight: Tensor, worth: Tensor) -> tuple[Tensor, Tensor]:
    """integers int8 (outs, ins) and scale (outs,) of weight float32: where no kernel runs, and beside it in tests."""
    steps = _top(weight)[:, None] / 127 * FACTORS_8.to(weight.device)  # (outs, candidates)
    found = [(worth * (weight - _codes(weight, step, 127) * step[:, None]).square()).sum(1) for step in steps.T]
    scale = steps.gather(1, torch.stack(found, 1).argmin(1, keepdim=True))[:, 0]
    return _codes(weight, scale, 127).to(torch.int8), scale


def _nearest_4(weight: Tensor, worth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not runs(weight):
        return nearest_4_torch(weight, worth)
    outs, ins = weight.shape
    codes, groups = (torch.empty(outs, count, dtype=torch.uint8) for count in (ins, -(-ins // GROUP)))
    scale = torch.empty(outs)
    arrays = (array(t) for t in (weight, worth, FACTORS_4))
    jit.nearest_4(outs, *arrays, codes.numpy(), groups.numpy(), array(scale))
    return codes, groups, scale


def nearest_4_torch(weight: Tensor, worth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes and groups uint8, and scale, of weight float32: where there is no kernel, and beside it in tests."""
    ins = weight.shape[1]
    spare = -ins % GROUP
    grouped = F.pad(weight, (0, spare)).view(len(weight), -1, GROUP)
    worths = F.pad(worth, (0, spare)).view(-1, GROUP)

    def found(scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Under a scale: error (outs,), codes less 8, places in SCALES, and the best scale for these integers."""
        error, codes, places = _of_scales(grouped, worths, scale)
        integers = codes * _scales(weight.device)[places][..., None]
        square = (worths * integers.square()).sum((1, 2))
        better = (worths * grouped * integers).sum((1, 2)) / square
        return error.sum(1), codes, places, torch.where(square > 0, better, scale)

    candidates = _top(weight)[:, None] / (7.5 * 14) * FACTORS_4.to(weight.device)
    best = torch.stack([found(scale)[0] for scale in candidates.T], 1).argmin(1, keepdim=True)
    *_, scale = found(candidates.gather(1, best)[:, 0])
    _, codes, places, scale = found(scale)
    return (codes + 8).flatten(1)[:, :ins].to(torch.uint8), places.to(torch.uint8), scale


def _of_scales(grouped: Tensor, worths: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grouped (outs, groups, GROUP), worths (groups, GROUP), scale (outs,): the least error of each group, its codes
    less 8, and its place in SCALES."""
    steps = scale[:, None, None] * _scales(grouped.device)  # (outs, 1, scales)
    codes = [_codes(grouped, step, 7, -8) for step in steps.unbind(2)]
    errors = torch.stack(
        [(worths * (grouped - c * s[..., None]).square()).sum(2) for c, s in zip(codes, steps.unbind(2), strict=True)]
    )
    error, place = errors.min(0)
    return error, torch.stack(codes).gather(0, place[None, ..., None].expand(1, *grouped.shape))[0], place


def _codes(weight: Tensor, step: Tensor, high: int, low: int | None = None) -> Tensor:
    """The nearest multiples of step; 0 where that is 0."""
    return (weight * step.reciprocal()[..., None]).round().clamp(-high if low is None else low, high).nan_to_num()


def _scales(device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(SCALES, dtype=torch.float32, device=device)


def _top(weight: Tensor) -> Tensor:
    """The largest of each row, 0 where it is as good as nothing."""
    top = weight.abs().amax(1)
    return torch.where(top < LEAST, 0, top)


def _wide(weight: Tensor) -> Tensor:
    """In float32, a copy of its own. Raises: ShapeError for what cannot be rounded."""
    wide = weight.to(torch.float32, copy=True)
    if not wide.isfinite().all():
        raise ShapeError("weight: must hold finite numbers, to be rounded to integers; got others")
    return wide


def _matrix(bits: int, parts: list[Tensor]) -> Matrix:
    return Matrix.of_integers(*parts) if bits == 8 else Matrix.of_codes(*parts)
