"""A matrix without bias: plain, cast to the dtype of what it multiplies (float32 master weights train a bfloat16
product); laid out for reading; or in integers."""

from collections.abc import Mapping
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn

from nemotron_h.ops.linear import MOST_ROWS, FewRows, few_rows, linear, packed
from nemotron_h.ops.quantized import Matrix, quantized_linear

ROW_BITS = "row_bits"  # int32, stored beside a matrix in integers


class Linear(nn.Module):
    """x (rows, in) -> (rows, out), in x's dtype."""

    few_rows: FewRows | None = None  # how a packed matrix is read by few rows

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.few_rows(x) if self.few_rows is not None and len(x) <= MOST_ROWS else linear(x, self.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(outs, ins)"""
        outs, ins = self.weight.shape
        return outs, ins

    def pack(self, like: "Linear | None" = None) -> None:
        """Lay the matrix out for reading; it is then not trained any more. like: another of that shape, packed."""
        self.weight = nn.Parameter(packed(self.weight.detach()), requires_grad=False)
        if like is None:
            self.few_rows = few_rows(self.weight)
        elif like.few_rows is not None:
            self.few_rows = few_rows(self.weight, like.few_rows.depth)


class QuantizedLinear(nn.Module):
    """The same with a matrix in integers, which is not trained: its tensors (`Matrix.tensors`), and row_bits, int32, of
    those that a row is rounded to, are parameters under their names."""

    def __init__(self, bits: int, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.bits, self.shape = bits, shape  # shape: (outs, ins)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @classmethod
    def of(cls, matrix: Matrix, row_bits: int) -> Self:
        return cls(matrix.bits, matrix.shape, matrix.tensors() | {ROW_BITS: torch.tensor(row_bits, dtype=torch.int32)})

    @classmethod
    def empty(cls, bits: int, shape: tuple[int, int], device: torch.device | str) -> Self:
        """Its tensors are to be put in."""
        expected = Matrix.shapes(bits, shape) | {ROW_BITS: ((), torch.int32)}
        return cls(bits, shape, {name: torch.empty(s, dtype=d, device=device) for name, (s, d) in expected.items()})

    @cached_property
    def matrix(self) -> Matrix:
        return Matrix.of_tensors(self.bits, self.shape, {name: p.detach() for name, p in self.named_parameters()})

    @cached_property
    def rounded_to(self) -> int:
        """Bits of a row."""
        return int(self.get_parameter(ROW_BITS).detach().cpu().numpy())

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: of the product, x's own where None."""
        return quantized_linear(x, self.matrix, self.rounded_to, dtype)
