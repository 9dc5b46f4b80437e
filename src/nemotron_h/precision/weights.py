"""A matrix in 8 or 4 bits: how it is rounded, and how finely the rows that meet it are.

    rows in 8 bits, unless that alone moves the products by more than ROWS_LIMIT of their norm: then in 16

A row's scale follows its largest number, so a few large ones leave few levels to the others. 16 bits cost no memory and
twice the operations, which few rows do not feel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_h.ops.quantized import LEVELS, Matrix, quantized_linear
from nemotron_h.ops.rounding import fed_back, nearest

BITS = {"int8": 8, "int4": 4}  # of the layers' matrices, by precision
HEAD = "lm_head"  # the module that is the head, which embeddings that are tied to it are not
HEAD_BITS = 8  # of the head's in each
ROWS_LIMIT = 0.05
MOST_ROWS = 1024  # that errors are measured with


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
    """A matrix in integers. Errors: how far products are moved, over their norm, by the weights' rounding, by that of
    the rows to 8 bits, and by both as it is used."""

    matrix: Matrix
    row_bits: int
    weight_error: float
    row_error: float
    error: float


def rounded(weight: Tensor, bits: int, met: Met) -> Rounded:
    """weight (outs, ins) in `bits`, with error feedback where met has products."""
    matrix = fed_back(weight, bits, met.products) if met.products is not None else nearest(weight, bits)
    x = met.rows.float()
    exact, wide = x @ weight.float().T, x @ matrix.dense().T
    norm = exact.norm().clamp(min=torch.finfo(torch.float32).tiny)

    def far(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / norm)

    used = {row_bits: quantized_linear(x, matrix, row_bits) for row_bits in LEVELS}
    row_error = far(used[8], wide)
    row_bits = 8 if row_error <= ROWS_LIMIT else 16
    return Rounded(matrix, row_bits, far(wide, exact), row_error, far(used[row_bits], exact))
