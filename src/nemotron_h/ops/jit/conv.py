"""Causal conv and SiLU in one pass over memory, and their gradient in another. Definition: `ops/conv.py`.

x (a line of rows, `step` elements from one to the next), taps (kernel, channels), bias (channels) and out (rows,
channels) float32 or bfloat16 bits; owner and place (rows,): each row's segment and its place in it, -1 for padding.
Taps are added oldest first, as the definition does.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.scalars import STRIDE, f, read, read_at, sigmoid, u, write
from nemotron_h.ops.jit.tiles import clear


@kernel(2)
def forward(
    start: Any, stop: Any, x: Any, step: Any, carried: Any, starts: Any, owner: Any, place: Any, taps: Any, bias: Any,
    out: Any,
) -> None:  # fmt: skip
    """carried (s, ring, channels), starts (s): the inputs before each segment, and its first place."""
    width, channels = taps.shape
    total = np.empty(channels, np.float32)
    for t in range(start, stop):
        for j in range(channels):
            total[j] = read_at(bias, j) if place[t] >= 0 else f(0)
        for k in range(width if place[t] >= 0 else 0):
            back = width - 1 - k
            if place[t] >= back:
                for j in range(channels):
                    total[j] += read_at(x, (t - back) * step + j) * read(taps, k, j)
            else:
                before = carried[owner[t], (starts[owner[t]] + place[t] - back) % carried.shape[1]]
                for j in range(channels):
                    total[j] += read_at(before, j) * read(taps, k, j)
        for j in range(channels):
            write(out, t, j, total[j] * sigmoid(total[j]))


@kernel(1)
def keep_last(start: Any, stop: Any, x: Any, step: Any, starts: Any, begins: Any, lengths: Any, carried: Any) -> None:
    """carried (s, ring, channels), of x's dtype; starts, begins, lengths (s): of each segment the first place, the
    first row, and how many."""
    ring, channels = carried.shape[1:]
    for segment in range(start, stop):
        for k in range(max(0, lengths[segment] - ring), lengths[segment]):
            line, place = (begins[segment] + k) * step, (starts[segment] + k) % ring
            for j in range(channels):
                carried[u(segment), u(place), u(j)] = x[u(line + j)]


@kernel(1)
def backward(
    start: Any, stop: Any, x: Any, step: Any, place: Any, taps: Any, bias: Any, grad: Any, grad_x: Any, partial: Any
) -> None:
    """Of segments with nothing before them. partial (parts, kernel + 1, channels) float32, zeros: each part of STRIDE
    rows adds its share of the taps' gradients and, last, the bias's."""
    rows, channels = grad.shape
    width, total = len(taps), np.empty(channels, np.float32)
    slope = np.empty((STRIDE + width - 1, channels), np.float32)  # before the SiLU, rows of the next part included
    for part in range(start, stop):
        first = part * STRIDE
        last = min(first + STRIDE, rows)
        clear(slope)
        for t in range(first, min(last + width - 1, rows)):
            if place[t] < 0:
                continue
            for j in range(channels):
                total[j] = read_at(bias, j)
            for k in range(width):
                back = width - 1 - k
                if place[t] >= back:
                    for j in range(channels):
                        total[j] += read_at(x, (t - back) * step + j) * read(taps, k, j)
            for j in range(channels):
                gate = sigmoid(total[j])
                slope[t - first, j] = read(grad, t, j) * gate * (f(1) + total[j] * (f(1) - gate))
        for t in range(first, last):
            for j in range(channels):
                total[j] = f(0)
            for j in range(channels):
                partial[part, width, j] += slope[t - first, j]
            for k in range(width):
                ahead = width - 1 - k  # tap k of the output that many rows on reads row t
                if t + ahead < rows and place[t + ahead] >= ahead:
                    for j in range(channels):
                        total[j] += slope[t - first + ahead, j] * read(taps, k, j)
                    for j in range(channels):
                        partial[part, k, j] += slope[t - first + ahead, j] * read_at(x, t * step + j)
            for j in range(channels):
                write(grad_x, t, j, total[j])
