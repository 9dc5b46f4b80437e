"""A matrix without bias: plain, cast to the dtype of what it multiplies (float32 master weights train a bfloat16
product); laid out for reading; or in integers."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from nemotron_h.ops.linear import Blocks, FewRows, few_rows, in_blocks, linear, packed
from nemotron_h.ops.quantized import Matrix, quantized_linear

ROW_BITS = "row_bits"  # int32, stored beside a matrix in integers


class Linear(nn.Module):
    """x (rows, in) -> (rows, out), in x's dtype."""

    kernel: Blocks | FewRows | None = None  # what reads a matrix that is laid out, as many rows as it takes

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.shape = out_features, in_features
        self.weight = nn.Parameter(torch.empty(self.shape, dtype=dtype, device=device))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.__dict__.pop("kernel", None)  # it reads the one before
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """For a copy: what oneDNN laid out can only be copied as the plain matrix, which is laid out again."""
        state = self.__dict__.copy()
        if self.weight.is_mkldnn:
            depth = self.kernel.depth if isinstance(self.kernel, FewRows) else None
            plain = nn.Parameter(self.plain(), requires_grad=False)
            state |= {"_parameters": {"weight": plain}, "kernel": None, "packed_with": depth}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy: its kernel reads its own weight."""
        of_onednn = "packed_with" in state
        depth = state.pop("packed_with", None)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(self.kernel, Blocks):
            self.kernel = Blocks(self.kernel.shape, self.weight.detach())
        elif of_onednn:
            self.weight = nn.Parameter(packed(self.weight.detach()), requires_grad=False)
            self.kernel = None if depth is None else few_rows(self.weight, depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x) if self.kernel is not None and len(x) <= self.kernel.most_rows else linear(x, self.weight)

    def pack(self, like: "Linear | None" = None) -> None:
        """Lay the matrix out for reading; it is then not trained any more. like: another of that shape, packed."""
        if isinstance(self.kernel, Blocks):
            return
        weight = self.weight.detach()
        blocks = in_blocks(weight)
        self.weight = nn.Parameter(packed(weight) if blocks is None else blocks.values, requires_grad=False)
        if blocks is not None:
            self.kernel = blocks
        elif like is None:
            self.kernel = few_rows(self.weight)
        elif isinstance(like.kernel, FewRows):
            self.kernel = few_rows(self.weight, like.kernel.depth)

    @property
    def packed(self) -> bool:
        return self.weight.is_mkldnn or self.kernel is not None

    def plain(self) -> Tensor:
        """The matrix (out, in), however it is laid out."""
        if isinstance(self.kernel, Blocks):
            return self.kernel.plain()
        weight = self.weight.detach()
        return weight.to_dense() if weight.is_mkldnn else weight


def plainly(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Of a parameter of that model: itself, but of a matrix that is laid out for reading the plain one."""
    matrices: dict[Tensor, Linear] = {module.weight: module for module in model.modules() if isinstance(module, Linear)}
    return lambda parameter: matrices[parameter].plain() if parameter in matrices else parameter.detach()


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
        return cls(matrix.bits, matrix.shape, matrix.tensors() | {ROW_BITS: matrix.totals.new_tensor(row_bits)})

    @classmethod
    def empty(cls, bits: int, shape: tuple[int, int], device: torch.device | str) -> Self:
        """Its tensors are to be put in."""
        expected = Matrix.shapes(bits, shape) | {ROW_BITS: ((), torch.int32)}
        return cls(bits, shape, {name: torch.empty(s, dtype=d, device=device) for name, (s, d) in expected.items()})

    def __setattr__(self, name: str, value: Any) -> None:
        self._forget()
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    def _forget(self) -> None:
        """What was made of the tensors that were there."""
        for name in ("matrix", "rounded_to"):
            self.__dict__.pop(name, None)

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
