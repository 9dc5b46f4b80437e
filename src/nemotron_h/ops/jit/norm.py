"""RMSNorm and gate + grouped RMSNorm in one pass each, and their gradients. Definition: `ops/norm.py`.

x, out (rows, channels) and gain (channels) float32 or bfloat16 bits; z a line of such rows, `step` elements from one to
the next; y (rows, channels) float32. A group's sum of squares is taken in LANES partial sums, added first to last: one
order, whatever the vector width.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.lanes import dot
from nemotron_h.ops.jit.scalars import STRIDE, f, read, read_at, sigmoid, u, write


@kernel(8)
def forward(start: Any, stop: Any, x: Any, gain: Any, epsilon: Any, out: Any) -> None:
    """out = gain * x / sqrt(mean(x^2) + epsilon)."""
    channels = out.shape[1]
    row = np.empty(channels, np.float32)
    for t in range(start, stop):
        for j in range(channels):
            row[j] = read(x, t, j)
        scale = f(1) / np.sqrt(dot(row, row, 0, channels) / f(channels) + epsilon)
        for j in range(channels):
            write(out, t, j, row[j] * scale * read_at(gain, j))


@kernel(1)
def backward(start: Any, stop: Any, x: Any, gain: Any, epsilon: Any, grad: Any, grad_x: Any, partial: Any) -> None:
    """partial (parts, channels) float32, zeros: each part of STRIDE rows adds its share of the gain's gradient."""
    rows, channels = grad.shape
    row, slope = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for part in range(start, stop):
        for t in range(part * STRIDE, min((part + 1) * STRIDE, rows)):
            for j in range(channels):
                row[j] = read(x, t, j)
            scale = f(1) / np.sqrt(dot(row, row, 0, channels) / f(channels) + epsilon)
            for j in range(channels):
                slope[j] = read(grad, t, j)
            for j in range(channels):
                partial[part, j] += slope[j] * row[j] * scale
            for j in range(channels):
                slope[j] *= read_at(gain, j)
            pull = dot(slope, row, 0, channels) * scale * scale / f(channels)
            for j in range(channels):
                write(grad_x, t, j, scale * (slope[j] - row[j] * pull))


@kernel(4)
def gated_forward(
    start: Any, stop: Any, y: Any, z: Any, step: Any, gain: Any, groups: Any, epsilon: Any, out: Any
) -> None:
    """v = y * silu(z); each group of v normed by itself; times the gain."""
    channels = out.shape[1]
    width = channels // groups
    row = np.empty(channels, np.float32)
    for t in range(start, stop):
        for j in range(channels):
            gate = read_at(z, t * step + j)
            row[u(j)] = y[u(t), u(j)] * (gate * sigmoid(gate))
        for first in range(0, channels, width):
            scale = f(1) / np.sqrt(dot(row, row, first, first + width) / f(width) + epsilon)
            for j in range(first, first + width):
                write(out, t, j, row[u(j)] * scale * read_at(gain, j))


@kernel(1)
def gated_backward(
    start: Any,
    stop: Any,
    y: Any,
    z: Any,
    step: Any,
    gain: Any,
    groups: Any,
    epsilon: Any,
    grad: Any,
    grad_y: Any,
    grad_z: Any,
    partial: Any,
) -> None:
    """partial (parts, channels) float32, zeros, as in `backward`."""
    rows, channels = grad.shape
    width = channels // groups
    row, slope, gates = np.empty(channels, np.float32), np.empty(channels, np.float32), np.empty(channels, np.float32)
    for part in range(start, stop):
        for t in range(part * STRIDE, min((part + 1) * STRIDE, rows)):
            for j in range(channels):
                gate = read_at(z, t * step + j)
                gates[j] = sigmoid(gate)
                row[j] = y[t, j] * (gate * gates[j])
            for j in range(channels):
                slope[j] = read(grad, t, j)
            for first in range(0, channels, width):
                last = first + width
                scale = f(1) / np.sqrt(dot(row, row, first, last) / f(width) + epsilon)
                for j in range(first, last):
                    partial[u(part), u(j)] += slope[u(j)] * row[u(j)] * scale
                for j in range(first, last):
                    slope[u(j)] *= read_at(gain, j)
                pull = dot(slope, row, first, last) * scale * scale / f(width)
                for j in range(first, last):
                    slope[u(j)] = scale * (slope[u(j)] - row[u(j)] * pull)  # by what the gate let through
            for j in range(channels):
                grad_y[t, j] = slope[j] * read_at(z, t * step + j) * gates[j]
            for j in range(channels):
                write(
                    grad_z, t, j, slope[j] * y[t, j] * gates[j] * (f(1) + read_at(z, t * step + j) * (f(1) - gates[j]))
                )
