"""The decay mask of a chunk, applied to its scores without being built. Definition: `ops/ssd.py`.

    mixed[c, h, i, j] = scores[c, h // r, i, j] * exp(a_i - a_j)        for places j not after query i, else 0

scores (chunks * groups, m, CHUNK), mixed (chunks * heads, m, CHUNK), a_queries (chunks * heads, m) and
a (chunks * heads, CHUNK), float32; places (chunks, m): the place of each query in its chunk.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.scalars import exp, f, kernel, prange


@kernel
def forward(scores: Any, a_queries: Any, a: Any, places: Any, mixed: Any) -> None:
    count, queries, width = mixed.shape
    heads, chunks = count // places.shape[0], places.shape[0]
    share = heads // (scores.shape[0] // chunks)
    for index in prange(count):
        chunk, group = index // heads, index // share
        for i in range(queries):
            top, seen = a_queries[index, i], places[chunk, i] + 1
            for j in range(width):
                gain = exp(top - a[index, j]) if j < seen else f(0)
                mixed[index, i, j] = scores[group, i, j] * gain


@kernel
def backward(
    scores: Any, a_queries: Any, a: Any, places: Any, grad: Any, grad_scores: Any, grad_queries: Any, grad_a: Any
) -> None:
    """grad: by mixed. grad_scores, grad_queries and grad_a: zeros, added to."""
    heads = grad.shape[0] // places.shape[0]
    queries, width = grad.shape[1:]
    share = grad.shape[0] // scores.shape[0]
    for group in prange(scores.shape[0]):
        chunk = group * share // heads
        lanes = np.empty(width, np.float32)
        for index in range(group * share, (group + 1) * share):
            for i in range(queries):
                top, seen = a_queries[index, i], places[chunk, i] + 1
                for j in range(width):
                    gain = exp(top - a[index, j]) if j < seen else f(0)
                    slope = grad[index, i, j] * gain
                    grad_scores[group, i, j] += slope
                    lanes[j] = slope * scores[group, i, j]
                    grad_a[index, j] -= lanes[j]
                total = f(0)
                for j in range(width):
                    total += lanes[j]
                grad_queries[index, i] = total
