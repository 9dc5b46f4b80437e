"""RMSNorm, and the grouped gated RMSNorm of a Mamba-2 layer.

    y = w * x / sqrt(mean(x^2) + epsilon)                        the gain is w, not 1 + w
    v = y * silu(z);  each of g groups of channels is normed by itself;  then the gain

The gate comes before the norm, and the norm is per group: facts other ports got wrong. Statistics are float32.
Source: arXiv:2504.03624 and NVIDIA's published modeling code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.ops.activation import silu
from nemotron_h.ops.jit import norm as jit
from nemotron_h.ops.jit.compiler import runs
from nemotron_h.ops.jit.scalars import STRIDE, array, f, lines
from nemotron_h.ops.shapes import expect, first_order, wants_gradient


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x (rows, d) any float, gain (d). Returns x's dtype; computed in float32."""
    expect(gain, "gain", tuple(x.shape[-1:]))
    expect(x, "x", (len(x), len(gain)))
    if not runs(x):
        return rms_norm_torch(x, gain, epsilon)
    if wants_gradient(x, gain):
        return _RmsNorm.apply(x, gain, epsilon)  # type: ignore[no-any-return,no-untyped-call]
    return _rms_norm(x, gain, epsilon)


def rms_norm_torch(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """The same in torch: where there is no kernel, and beside the kernel in tests."""
    return (F.rms_norm(x.float(), x.shape[-1:], None, epsilon) * gain.float()).to(x.dtype)


def gated_rms_norm(y: Tensor, z: Tensor, gain: Tensor, num_groups: int, epsilon: float) -> Tensor:
    """y (rows, d) float32, z (rows, d) any float, gain (d). Returns z's dtype; computed in float32."""
    expect(y, "y", tuple(z.shape), torch.float32)
    expect(gain, "gain", tuple(z.shape[-1:]))
    expect(z, "z", (len(z), len(gain)))
    if num_groups < 1 or gain.shape[0] % num_groups:
        raise ShapeError(f"num_groups: must divide the {gain.shape[0]} channels; got {num_groups}")
    if not runs(y, z):
        return gated_rms_norm_torch(y, z, gain, num_groups, epsilon)
    if wants_gradient(y, z, gain):
        return _GatedRmsNorm.apply(y, z, gain, num_groups, epsilon)  # type: ignore[no-any-return,no-untyped-call]
    return _gated_rms_norm(y, z, gain, num_groups, epsilon)


def gated_rms_norm_torch(y: Tensor, z: Tensor, gain: Tensor, num_groups: int, epsilon: float) -> Tensor:
    """The same in torch: where there is no kernel, and beside the kernel in tests."""
    rows, channels = y.shape
    gated = (y * silu(z)).view(rows, num_groups, channels // num_groups)
    normed = F.rms_norm(gated, gated.shape[-1:], None, epsilon).view(rows, channels)
    return (normed * gain.float()).to(z.dtype)


def _rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    jit.forward(len(x), array(x.contiguous()), array(gain), f(epsilon), array(out))
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, gain)
        ctx.epsilon = epsilon
        return _rms_norm(x, gain, epsilon)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain = ctx.saved_tensors
        grad_x, partial = torch.empty_like(x), _parts(x)
        jit.backward(
            len(partial), array(x), array(gain), f(ctx.epsilon), array(grad.contiguous()), array(grad_x),
            array(partial),
        )  # fmt: skip
        return grad_x, partial.double().sum(0).to(gain.dtype), None


def _gated_rms_norm(y: Tensor, z: Tensor, gain: Tensor, num_groups: int, epsilon: float) -> Tensor:
    out = torch.empty(z.shape, dtype=z.dtype)
    jit.gated_forward(len(y), array(y.contiguous()), *lines(z), array(gain), num_groups, f(epsilon), array(out))
    return out


class _GatedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, gain: Tensor, num_groups: int, epsilon: float) -> Tensor:
        y = y.contiguous()
        ctx.save_for_backward(y, z, gain)
        ctx.settings = num_groups, epsilon
        return _gated_rms_norm(y, z, gain, num_groups, epsilon)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        y, z, gain = ctx.saved_tensors
        num_groups, epsilon = ctx.settings
        grad_y, grad_z, partial = torch.empty_like(y), torch.empty(z.shape, dtype=z.dtype), _parts(y)
        jit.gated_backward(
            len(partial), array(y), *lines(z), array(gain), num_groups, f(epsilon), array(grad.contiguous()),
            array(grad_y), array(grad_z), array(partial),
        )  # fmt: skip
        return grad_y, grad_z, partial.double().sum(0).to(gain.dtype), None, None


def _parts(x: Tensor) -> Tensor:
    """Room for each part's share of the gain's gradient, to be added in float64."""
    return torch.zeros(-(-x.shape[0] // STRIDE), x.shape[1])
