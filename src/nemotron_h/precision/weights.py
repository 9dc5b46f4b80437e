"""A matrix in 8 or 4 bits: how it is rounded, and how finely the rows that meet it are.

    rows in 8 bits, unless that alone moves a row's products by more than ROWS_LIMIT of their norm: then in 16

A row's scale follows its largest number, so a few large ones leave few levels to the others. 16 bits cost no memory and
twice the operations, which few rows do not feel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.ops.quantized import LEVELS, Matrix, quantized_linear
from nemotron_h.ops.rounding import fed_back, nearest

BITS = {"int8": 8, "int4": 4}  # of the layers' matrices, by precision
HEAD = "lm_head"  # the module that is the head, which embeddings that are tied to it are not
HEAD_BITS = 8  # of the head's in each
ROWS_LIMIT = 0.05
MOST_ROWS = 1024  # that errors are measured with
AT_ONCE = 4096  # outputs whose products are looked at together


class Met:
    """The rows that meet a matrix: some of them, and where wanted, the products x^T x of all."""

    def __init__(self, *, products: bool) -> None:
        self.some: list[Tensor] = []
        self.products: Tensor | None = None
        self._wanted = products

    def add(self, x: Tensor) -> None:
        """x (rows, ins)."""
        kept = MOST_ROWS - sum(map(len, self.some))
        if kept > 0:
            self.some.append(x[:kept].clone())
        if self._wanted:
            wide = x.float()
            found = (wide.T @ wide).double()
            self.products = found if self.products is None else self.products.add_(found)

    @property
    def rows(self) -> Tensor:
        """(at most MOST_ROWS, ins)"""
        return torch.cat(self.some)


@dataclass(frozen=True)
class Rounded:
    """A matrix in integers. Errors: how far the products of a row are moved, over their norm, root mean square over the
    rows: by the weights' rounding, by that of the rows to 8 bits, and by both as it is used."""

    matrix: Matrix
    row_bits: int
    weight_error: float
    row_error: float
    error: float


def rounded(weight: Tensor, bits: int, met: Met) -> Rounded:
    """weight (outs, ins) in `bits`, with error feedback where met has products.

    Raises: ShapeError for a weight, or rows that meet it, with what is no finite number.
    """
    matrix = fed_back(weight, bits, met.products) if met.products is not None else nearest(weight, bits)
    x = met.rows.float()
    if not x.isfinite().all():
        raise ShapeError("rows: must be finite, to be rounded for; the text gives infinity, or what is no number")
    used = {row_bits: quantized_linear(x, matrix, row_bits) for row_bits in LEVELS}
    of_weight, of_rows, norm = Squares(len(x)), Squares(len(x)), Squares(len(x))
    of_both = {row_bits: Squares(len(x)) for row_bits in LEVELS}
    integers, scale = matrix.integers(), matrix.scale
    for some in torch.arange(len(weight)).split(AT_ONCE):  # a head is wide: some outputs at a time
        one = slice(int(some[0]), int(some[-1]) + 1)
        exact, wide = x @ weight[one].float().T, x @ (integers[one] * scale[one, None]).T
        norm.add(exact)
        of_weight.add(wide - exact)
        of_rows.add(used[8][:, one] - wide)
        for row_bits, total in of_both.items():
            total.add(used[row_bits][:, one] - exact)
    row_error = of_rows.over(norm)
    row_bits = 8 if row_error <= ROWS_LIMIT else 16
    return Rounded(matrix, row_bits, of_weight.over(norm), row_error, of_both[row_bits].over(norm))


class Squares:
    """The sum of squares of each of so many rows."""

    def __init__(self, rows: int) -> None:
        self.sums = torch.zeros(rows, dtype=torch.float64)

    def add(self, part: Tensor) -> None:
        """part (rows, some outputs) float32."""
        self.sums += part.square().sum(1, dtype=torch.float64).cpu()

    def over(self, norm: "Squares") -> float:
        """The root of the mean of their quotients: each row counts alike, a large one does not hide the others. Rows
        without products are not counted."""
        some = norm.sums > 0
        return float((self.sums[some] / norm.sums[some]).mean().sqrt()) if some.any() else 0.0
