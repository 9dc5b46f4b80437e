"""Checks at an op's door: a wrong shape or dtype is refused by the argument's name."""

import torch
from torch import Tensor

from nemotron_h.errors import ShapeError


def expect(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raise ShapeError unless tensor has this shape (and dtype, where given)."""
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{name}: must have shape {shape}; got {tuple(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ShapeError(f"{name}: must be {dtype}; got {tensor.dtype}")
