"""RMSNorm and gate + grouped RMSNorm in one pass each, and their gradients. Definition: `ops/norm.py`.

x, z, out (rows, channels) float32 or bfloat16 bits; y (rows, channels) float32; gain (channels) float32. A group's sum
of squares is taken in LANES partial sums, added first to last: one order, whatever the vector width.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.scalars import f, inline, kernel, prange, read, sigmoid, write

LANES = 16
STRIDE = 64  # rows of one piece of the gain's gradient


@inline
def dot(a, b):  # type: ignore[no-untyped-def]
    """Sum of a * b over vectors of float32."""
    lanes = np.zeros(LANES, np.float32)
    whole = len(a) // LANES * LANES
    for j in range(0, whole, LANES):
        for k in range(LANES):
            lanes[k] += a[j + k] * b[j + k]
    total = f(0)
    for k in range(LANES):
        total += lanes[k]
    for j in range(whole, len(a)):
        total += a[j] * b[j]
    return total


@kernel
def forward(x: Any, gain: Any, epsilon: Any, out: Any) -> None:
    """out = gain * x / sqrt(mean(x^2) + epsilon)."""
    rows, channels = out.shape
    for t in prange(rows):
        row = np.empty(channels, np.float32)
        for j in range(channels):
            row[j] = read(x, t, j)
        scale = f(1) / np.sqrt(dot(row, row) / f(channels) + epsilon)
        for j in range(channels):
            write(out, t, j, row[j] * scale * gain[j])


@kernel
def backward(x: Any, gain: Any, epsilon: Any, grad: Any, grad_x: Any, partial: Any) -> None:
    """partial (pieces, channels) float32, zeros: each piece of STRIDE rows adds its part of the gain's gradient."""
    rows, channels = grad.shape
    for piece in prange(partial.shape[0]):
        row, slope = np.empty(channels, np.float32), np.empty(channels, np.float32)
        sums = np.zeros(channels, np.float32)
        for t in range(piece * STRIDE, min((piece + 1) * STRIDE, rows)):
            for j in range(channels):
                row[j] = read(x, t, j)
            scale = f(1) / np.sqrt(dot(row, row) / f(channels) + epsilon)
            for j in range(channels):
                given = read(grad, t, j)
                slope[j] = given * gain[j]
                sums[j] += given * row[j] * scale
            pull = dot(slope, row) * scale * scale / f(channels)
            for j in range(channels):
                write(grad_x, t, j, scale * (slope[j] - row[j] * pull))
        partial[piece, :] = sums


@kernel
def gated_forward(y: Any, z: Any, gain: Any, groups: Any, epsilon: Any, out: Any) -> None:
    """v = y * silu(z); each group of v normed by itself; times the gain."""
    rows, channels = out.shape
    width = channels // groups
    for t in prange(rows):
        row = np.empty(channels, np.float32)
        for j in range(channels):
            gate = read(z, t, j)
            row[j] = y[t, j] * (gate * sigmoid(gate))
        scales = np.empty(channels, np.float32)
        for group in range(groups):
            part = row[group * width : (group + 1) * width]
            scales[group * width : (group + 1) * width] = f(1) / np.sqrt(dot(part, part) / f(width) + epsilon)
        for j in range(channels):
            write(out, t, j, row[j] * scales[j] * gain[j])


@kernel
def gated_backward(
    y: Any, z: Any, gain: Any, groups: Any, epsilon: Any, grad: Any, grad_y: Any, grad_z: Any, partial: Any
) -> None:
    """partial (pieces, channels) float32, zeros, as in `backward`."""
    rows, channels = grad.shape
    width = channels // groups
    for piece in prange(partial.shape[0]):
        row, slope = np.empty(channels, np.float32), np.empty(channels, np.float32)
        sums = np.zeros(channels, np.float32)
        scales, pulls = np.empty(channels, np.float32), np.empty(channels, np.float32)
        for t in range(piece * STRIDE, min((piece + 1) * STRIDE, rows)):
            for j in range(channels):
                gate = read(z, t, j)
                row[j] = y[t, j] * (gate * sigmoid(gate))
                slope[j] = read(grad, t, j) * gain[j]
            for group in range(groups):
                first, last = group * width, (group + 1) * width
                part = row[first:last]
                scale = f(1) / np.sqrt(dot(part, part) / f(width) + epsilon)
                scales[first:last] = scale
                pulls[first:last] = dot(slope[first:last], part) * scale * scale / f(width)
            for j in range(channels):
                sums[j] += read(grad, t, j) * row[j] * scales[j]
                below = scales[j] * (slope[j] - row[j] * pulls[j])
                gate = read(z, t, j)
                open_ = sigmoid(gate)
                grad_y[t, j] = below * gate * open_
                write(grad_z, t, j, below * y[t, j] * open_ * (f(1) + gate * (f(1) - open_)))
        partial[piece, :] = sums
