"""Checks at an op's door: what it cannot take is refused by the argument's name."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from nemotron_h.errors import ShapeError, UnsupportedError


def expect(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raise ShapeError unless tensor has this shape (and dtype, where given)."""
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{name}: must have shape {shape}; got {tuple(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ShapeError(f"{name}: must be {dtype}; got {tensor.dtype}")


def wants_gradient(*tensors: Tensor) -> bool:
    """Would autograd record an operation on them?"""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward that is no operation of autograd's: refuse a gradient of it, which would be nothing in silence."""

    @wraps(backward)
    def checked(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedError("create_graph: must be False; gradients of the ops' gradients are not implemented")
        return backward(*arguments)

    return checked
