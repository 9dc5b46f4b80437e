"""SiLU, softplus and squared ReLU, whose bits do not depend on a value's place in the tensor.

torch's own silu and softplus take another path in the tail of a vector and at the border between two threads. exp,
log1p, multiplication, addition and division do not, so these are built of them, in float32. Their gradients are written
out: differentiating y / (1 + exp(-y)) step by step gives inf / inf for y below -88.
"""

from typing import Any

import torch
from torch import Tensor

from nemotron_h.ops.jit import rows as jit
from nemotron_h.ops.jit.compiler import runs
from nemotron_h.ops.jit.scalars import array
from nemotron_h.ops.shapes import first_order, wants_gradient


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)), computed and returned in float32. Any shape, any float dtype."""
    return _Silu.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), computed and returned in float32."""
    return _Softplus.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2, in x's dtype."""
    if wants_gradient(x):
        return _Relu2.apply(x)  # type: ignore[no-any-return,no-untyped-call]
    if x.dim() != 2 or not runs(x):
        return torch.relu(x).square_()
    out = torch.empty(x.shape, dtype=x.dtype)
    jit.relu2(len(x), array(x), array(out))
    return out


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        x = x.float()
        return x / x.neg().exp_().add_(1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wide = x.float()
        gate = wide.neg().exp_().add_(1).reciprocal_()  # sigmoid(x)
        slope = wide.mul_(1 - gate) if x.dtype != torch.float32 else wide * (1 - gate)
        total: Tensor = slope.add_(1).mul_(gate).mul_(grad)
        return total.to(x.dtype)


class _Relu2(torch.autograd.Function):
    """Two passes over memory each way; autograd's own gradient of a square takes four."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        slope: Tensor = (grad * positive).mul_(2)
        return slope


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        x = x.float()
        return x.clamp(min=0) + x.abs().neg_().exp_().log1p_()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate: Tensor = x.float().neg().exp_().add_(1).reciprocal_()
        return (grad * gate).to(x.dtype)
