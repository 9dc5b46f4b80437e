"""The causal depthwise convolution of a Mamba-2 layer, over segments, with the inputs before them carried.

    out_t = silu(bias + sum_k weight_k * in_{t - 3 + k})        k = 0..3, the last tap multiplies the newest input

A segment's first outputs read the last inputs of its own sequence, zeros where there are none: never its neighbour's.
"""

import torch
from torch import Tensor

from nemotron_h.ops.activation import silu
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.shapes import expect


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, segments: Segments, carried: Tensor | None) -> Tensor:
    """x (rows, channels), weight (channels, 1, kernel), bias (channels), carried (segments, kernel - 1, channels) or None.

    Returns (rows, channels) in x's dtype; computed in float32, taps added oldest first.
    """
    rows, channels = x.shape
    kernel = weight.shape[-1]
    expect(weight, "weight", (channels, 1, kernel))
    expect(bias, "bias", (channels,))
    if carried is None:
        carried = x.new_zeros(len(segments), kernel - 1, channels)
    expect(carried, "carried", (len(segments), kernel - 1, channels))
    inputs = torch.cat((carried.flatten(0, 1), x)).float()
    taps = segments.taps(kernel).to(x.device)
    gains = weight.float()
    total = bias.float().expand(rows, channels)
    for tap in range(kernel):
        total = total + inputs[taps[tap]] * gains[:, 0, tap]
    return silu(total).to(x.dtype)


def last_inputs(x: Tensor, segments: Segments, carried: Tensor) -> Tensor:
    """What the next call must be given as carried: the last kernel - 1 inputs of each segment, newest last."""
    reach = carried.shape[1]
    kept = []
    for index, (begin, length) in enumerate(zip(segments.begins, segments.lengths, strict=True)):
        new = x[begin + max(0, length - reach) : begin + length]
        kept.append(torch.cat((carried[index, len(new) :], new)))
    return torch.stack(kept)


def conv_definition(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> Tensor:
    """One sequence as the formula reads: x (l, channels), before (kernel - 1, channels). Returns (l, channels)."""
    window = torch.cat((before, x))
    kernel = weight.shape[-1]
    outputs = []
    for t in range(x.shape[0]):
        total = bias + sum(weight[:, 0, k] * window[t + k] for k in range(kernel))
        outputs.append(total * torch.sigmoid(total))
    return torch.stack(outputs)
