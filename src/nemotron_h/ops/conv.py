"""The causal depthwise convolution of a Mamba-2 layer, over segments, with the inputs before them carried.

    out_t = silu(bias + sum_k weight_k * in_{t - 3 + k})        k = 0..3, the last tap multiplies the newest input

A segment's first outputs read the last inputs of its own sequence, zeros where there are none: never its neighbour's.
They are kept in a ring: the input of place t stands at t modulo its length. Whoever has read too far goes back by
saying so, for what stood before is still there.
"""

from typing import Any

import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.ops.activation import silu
from nemotron_h.ops.jit import conv as jit
from nemotron_h.ops.jit.compiler import runs
from nemotron_h.ops.jit.scalars import STRIDE, array, lines
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.shapes import expect, first_order, wants_gradient


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, segments: Segments, carried: Tensor | None) -> Tensor:
    """x (rows, channels), weight (channels, 1, kernel), bias (channels), carried (segments, ring, channels).

    Returns (rows, channels) in x's dtype, zeros for padding; computed in float32, taps added oldest first.
    carried: the inputs before each segment, in a ring of kernel - 1 or more; None for zeros. Differentiable where
    nothing is carried.
    Raises: ShapeError, naming the argument.
    """
    channels, kernel = x.shape[1], weight.shape[-1]
    expect(x, "x", (segments.rows, channels))
    expect(weight, "weight", (channels, 1, kernel))
    expect(bias, "bias", (channels,))
    if carried is not None:
        expect(carried, "carried", (len(segments), max(kernel - 1, carried.shape[1]), channels), x.dtype)
        if wants_gradient(x, weight, bias, carried):
            raise ShapeError("carried: must be None where gradients are wanted; training passes no state")
    if not runs(x):
        return causal_conv_torch(x, weight, bias, segments, carried)
    if wants_gradient(x, weight, bias):
        return _CausalConv.apply(x, weight, bias, segments)  # type: ignore[no-any-return,no-untyped-call]
    return _causal_conv(x, weight, bias, segments, carried)


def causal_conv_torch(x: Tensor, weight: Tensor, bias: Tensor, segments: Segments, carried: Tensor | None) -> Tensor:
    """The same in torch: where there is no kernel, and beside the kernel in tests."""
    rows, channels = x.shape
    kernel = weight.shape[-1]
    if carried is None:
        before = x.new_zeros(len(segments), kernel - 1, channels)
    else:
        places = (ring_places(start, kernel - 1, carried.shape[1]) for start in segments.starts)
        before = torch.stack([own[held.to(x.device)] for own, held in zip(carried, places, strict=True)])
    inputs = torch.cat((before.flatten(0, 1), x)).float()
    taps = segments.taps(kernel).to(x.device)
    gains = weight.float()
    total = bias.float().expand(rows, channels)
    for tap in range(kernel):
        total = total + inputs[taps[tap]] * gains[:, 0, tap]
    real = (segments.offsets >= 0).to(x.device)[:, None]
    return torch.where(real, silu(total), 0).to(x.dtype)


def _causal_conv(x: Tensor, weight: Tensor, bias: Tensor, segments: Segments, carried: Tensor | None) -> Tensor:
    if carried is None:
        carried = x.new_zeros(len(segments), weight.shape[-1] - 1, x.shape[1])
    out = torch.empty(x.shape, dtype=x.dtype)
    owner, place = segments.owners.numpy(), segments.offsets.numpy()
    jit.forward(len(x), *lines(x), array(carried), segments.spans[0], owner, place, *_taps(weight, bias), array(out))
    return out


def _taps(weight: Tensor, bias: Tensor) -> tuple[Any, Any]:
    """As the kernels read them: (kernel, channels) and (channels)."""
    return array(weight[:, 0].T.contiguous()), array(bias)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, segments: Segments) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.segments = segments
        return _causal_conv(x, weight, bias, segments, None)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias = ctx.saved_tensors
        taps, gain = _taps(weight, bias)
        grad_x = torch.empty(x.shape, dtype=x.dtype)
        partial = torch.zeros(-(-len(x) // STRIDE), len(taps) + 1, x.shape[1])
        place = ctx.segments.offsets.numpy()
        jit.backward(
            len(partial), *lines(x), place, taps, gain, array(grad.contiguous()), array(grad_x), array(partial)
        )
        sums = partial.double().sum(0)  # (kernel + 1, channels)
        return grad_x, sums[:-1].T[:, None].to(weight.dtype), sums[-1].to(bias.dtype), None


def keep_last(x: Tensor, segments: Segments, carried: Tensor) -> None:
    """Write what later calls must be given into the rings of carried: the last inputs of each segment."""
    if runs(x, carried):
        jit.keep_last(len(segments), *lines(x), *segments.spans, array(carried))
        return
    ring = carried.shape[1]
    for own, start, begin, length in zip(carried, segments.starts, segments.begins, segments.lengths, strict=True):
        count = min(length, ring)
        own[ring_places(start + length, count, ring).to(x.device)] = x[begin + length - count : begin + length]


def ring_places(end: int, count: int, ring: int) -> Tensor:
    """(count,) int64: where a ring of that length holds the last inputs before place end, newest last."""
    return torch.arange(end - count, end) % ring


def conv_definition(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> Tensor:
    """One sequence as the formula reads: x (l, channels), before (kernel - 1, channels). Returns (l, channels)."""
    window = torch.cat((before, x))
    kernel = weight.shape[-1]
    outputs = []
    for t in range(x.shape[0]):
        total = bias + sum(weight[:, 0, k] * window[t + k] for k in range(kernel))
        outputs.append(total * torch.sigmoid(total))
    return torch.stack(outputs)
