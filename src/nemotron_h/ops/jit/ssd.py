"""The chunked scan, tile by tile in cache, and its gradient. Definition and formulas: `ops/ssd.py`.

Every matrix is two-dimensional and contiguous, its leading letters folded into rows:
    x (c h CHUNK, p)   y and its gradient (c m, h p)   dt, a (c h, CHUNK)
    B (c g CHUNK, n)   C (c g m, n)                    states (c h n, p)
x, B and C are float32 or bfloat16 bits, the rest float32. A state stands transposed, (n, p). A task is one head
or group of one chunk, made of what `tiles.py` has and of loops over few arrays: of a few LLVM can tell that they do not
overlap, and makes vector code; of many it gives up.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.scalars import compile_once, exp, f, piece
from nemotron_h.ops.jit.tiles import (
    HEIGHT,
    LANES,
    add_causal_product,
    add_column_sums,
    add_dots,
    add_product,
    add_scaled_columns,
    clear,
    load,
    load_turned,
    multiply,
    scale_columns,
    scale_rows,
    store,
    zeros,
)


@kernel(2)
def writes(start: Any, stop: Any, x: Any, dt: Any, a: Any, B: Any, share: Any, out: Any) -> None:
    """out (c h n, p): what each chunk adds to the state by its end, sum_j exp(a_end - a_j) dt_j x_j B_j^T."""
    width, p, n = a.shape[1], x.shape[1], B.shape[1]
    inputs, keys, added = np.empty((width, p), np.float32), np.empty((width, n), np.float32), zeros(n, p)
    weights = np.empty(width, np.float32)
    for index in range(start, stop):
        clear(added)
        load(inputs, x, index * width, 0, width)
        load(keys, B, index // share * width, 0, width)
        for j in range(width):
            weights[j] = exp(a[index, width - 1] - a[index, j]) * dt[index, j]
        scale_rows(inputs, weights)
        add_product(added, 0, n, p, keys.T, 0, inputs, 0, width)
        store(out, index * n, 0, added)


@kernel(1)
def pass_on(
    start: Any, stop: Any, added: Any, a: Any, first: Any, counts: Any, heads: Any, state: Any, before: Any
) -> None:
    """before (c h n, p): the state at the beginning of each chunk, from state (s h n, p). first, counts (s,): chunks.

    The last chunk of a segment adds nothing to `before`; state is overwritten with the state before that chunk.
    """
    n, p = state.shape[0] // (len(first) * heads), state.shape[1]
    for task in range(start, stop):
        segment, head = task // heads, task % heads
        for chunk in range(first[segment], first[segment] + counts[segment]):
            index = chunk * heads + head
            last = chunk == first[segment] + counts[segment] - 1
            gain = exp(a[index, a.shape[1] - 1])
            for k in range(n):
                here, there = index * n + k, task * n + k
                for q in range(p):
                    before[here, q] = state[there, q]
                if not last:
                    for q in range(p):
                        state[there, q] = state[there, q] * gain + added[here, q]


@kernel(2)
def outputs(
    start: Any, stop: Any, x: Any, dt: Any, a: Any, B: Any, C: Any, skip: Any, before: Any, share: Any,
    places: Any, begins: Any, counts: Any, y: Any,
) -> None:  # fmt: skip
    """y (c m, h p). skip (h,): what each head adds of its own x. places (c,): where each chunk's queries begin;
    begins, counts (c,): which places are new; the other queries get zero."""
    total, width = a.shape
    heads, p, n = total // len(places), x.shape[1], C.shape[1]
    m = len(C) * share // total
    keys_turned, inputs, out = np.empty((n, width), np.float32), np.empty((width, p), np.float32), zeros(m, p)
    queries, gained, gains = np.empty((m, n), np.float32), np.empty((m, n), np.float32), np.zeros(m, np.float32)
    scores, factors = zeros(m, width), np.empty((m, width), np.float32)
    for group in range(start, stop):
        chunk = group * share // heads
        first = places[chunk]  # of the queries; begin..end of them are new
        begin = begins[chunk] - first
        end = begin + counts[chunk]
        clear(scores)
        load_turned(keys_turned, B, group * width, 0)
        load(queries, C, group * m, 0, m)
        add_product(scores, begin, end, width, queries, 0, keys_turned, 0, n)
        for index in range(group * share, (group + 1) * share):
            load(inputs, x, index * width, 0, width)
            clear(out)
            own = skip[index % heads]
            for i in range(begin, end):
                top = a[index, first + i]
                gains[i] = exp(top)
                for j in range(width):
                    factors[i, j] = scores[i, j] * exp(top - a[index, j]) * dt[index, j]
                for q in range(p):
                    out[i, q] = own * inputs[first + i, q]
            add_causal_product(out, begin, end, factors, inputs, first)
            if len(before) > 0:
                load(gained, C, group * m, 0, m)
                scale_rows(gained, gains)
                add_product(out, begin, end, p, gained, 0, before, index * n, n)
            store(y, chunk * m, index % heads * p, out)


@kernel(2)
def states_gradient(start: Any, stop: Any, a: Any, C: Any, grad: Any, share: Any, heads: Any, out: Any) -> None:
    """out (c h n, p): of the loss by the state before each chunk, through its queries. grad (c m, h p): by y."""
    n, p = C.shape[1], grad.shape[1] // heads
    m = len(C) * share // len(a)
    queries, slope, added = np.empty((m, n), np.float32), np.empty((m, p), np.float32), zeros(n, p)
    gains = np.empty(m, np.float32)
    for index in range(start, stop):
        clear(added)
        load(queries, C, index // share * m, 0, m)
        load(slope, grad, index // heads * m, index % heads * p, m)
        for i in range(m):
            gains[i] = exp(a[index, i])
        scale_rows(slope, gains)
        add_product(added, 0, n, p, queries.T, 0, slope, 0, m)
        store(out, index * n, 0, added)


@kernel(1)
def pass_back(
    start: Any, stop: Any, before: Any, a: Any, first: Any, counts: Any, heads: Any, by_state: Any, by_a: Any
) -> None:
    """by_state (c h n, p): in, of the loss by the state before each chunk through its queries; out, by what the chunk
    adds to the state. by_a (c h, CHUNK): the last place gets the part through the chunk's gain."""
    count, width = a.shape
    n, p = before.shape[0] // count, before.shape[1]
    behind, total = zeros(n, p), np.empty(p, np.float32)  # behind: by the state after the chunk at hand
    for task in range(start, stop):
        segment, head = task // heads, task % heads
        clear(behind)
        for step in range(counts[segment]):
            index = (first[segment] + counts[segment] - 1 - step) * heads + head
            gain = exp(a[index, width - 1])
            for q in range(p):
                total[q] = f(0)
            for k in range(n):
                here = index * n + k
                for q in range(p):
                    total[q] += behind[k, q] * before[here, q]
                    direct = by_state[here, q]
                    by_state[here, q] = behind[k, q]
                    behind[k, q] = direct + gain * behind[k, q]
            for q in range(p):
                by_a[index, width - 1] += gain * total[q]


@kernel(1)
def gradient(
    start: Any, stop: Any, x: Any, dt: Any, a: Any, B: Any, C: Any, skip: Any, before: Any, by_writes: Any, grad: Any,
    share: Any, by_x: Any, by_dt: Any, by_a: Any, by_B: Any, by_C: Any, by_skip: Any,
) -> None:  # fmt: skip
    """Of the loss by every input, the queries being a chunk's first m places. by_dt and by_a are added to;
    by_skip (c h,): each chunk's part."""
    width, n, p, heads = a.shape[1], C.shape[1], x.shape[1], len(skip)
    m = len(C) * share // len(a)
    keys, keys_turned = np.empty((width, n), np.float32), np.empty((n, width), np.float32)
    queries, queries_turned = np.empty((m, n), np.float32), np.empty((n, m), np.float32)
    inputs, inputs_turned = np.empty((width, p), np.float32), np.empty((p, width), np.float32)
    slope, slope_turned = np.empty((m, p), np.float32), np.empty((p, m), np.float32)
    for group in range(start, stop):
        load(keys, B, group * width, 0, width)
        load(queries, C, group * m, 0, m)
        load_turned(keys_turned, B, group * width, 0)
        load_turned(queries_turned, C, group * m, 0)
        scores, by_scores = zeros(m, width), zeros(m, width)
        add_product(scores, 0, m, width, queries, 0, keys_turned, 0, n)
        keys_out, queries_out = zeros(n, width), zeros(n, m)  # through the states, turned
        for index in range(group * share, (group + 1) * share):
            out, skipped = zeros(width, p), np.zeros(p, np.float32)
            load(inputs, x, index * width, 0, width)
            load_turned(inputs_turned, x, index * width, 0)
            load(slope, grad, index // heads * m, index % heads * p, m)
            load_turned(slope_turned, grad, index // heads * m, index % heads * p)
            add_dots(skipped, slope, inputs)
            by_skip[index] = f(0)
            for q in range(p):
                by_skip[index] += skipped[q]
            for i in range(m):
                for q in range(p):
                    out[i, q] = skip[index % heads] * slope[i, q]
            within_chunk(dt, a, index, scores, inputs_turned, slope, by_scores, out, by_dt, by_a)
            if len(before) > 0:
                state = np.empty((n, p), np.float32)
                load(state, before, index * n, 0, n)
                through_reads(a, index, state, queries_turned, slope_turned, queries_out, by_a)
                load(state, by_writes, index * n, 0, n)
                through_writes(dt, a, index, state, keys_turned, inputs_turned, keys_out, out, by_dt, by_a)
            store(by_x, index * width, 0, out)
        by_keys, by_queries = np.empty((width, n), np.float32), np.empty((m, n), np.float32)
        load_turned(by_keys, keys_out, 0, 0)
        load_turned(by_queries, queries_out, 0, 0)
        add_product(by_keys, 0, width, n, by_scores.T, 0, queries, 0, m)
        add_product(by_queries, 0, m, n, by_scores, 0, keys, 0, width)
        store(by_B, group * width, 0, by_keys)
        store(by_C, group * m, 0, by_queries)


@piece
def within_chunk(dt, a, index, scores, inputs_turned, slope, by_scores, out, by_dt, by_a):  # type: ignore[no-untyped-def]
    """A head's gradients through what its queries read of their own chunk; out is the gradient by x."""
    compile_once()
    m, p = slope.shape
    width = inputs_turned.shape[1]
    decay, pulls = zeros(m, width), zeros(m, width)
    steps, by_steps, row_sums = np.empty((width, 1), np.float32), np.zeros(width, np.float32), zeros(m, 1)
    for i in range(m):
        for j in range(i + 1):
            decay[i, j] = exp(a[index, i] - a[index, j])
        if i % HEIGHT == 0:  # pulls: dy_i . x_j, in whole vectors of the places that these queries see
            reach = min((i // LANES + 1) * LANES, width)
            add_product(pulls, i, min(i + HEIGHT, m), reach, slope, 0, inputs_turned, 0, p)
    multiply(pulls, decay)
    add_scaled_columns(by_scores, pulls, dt[index])
    multiply(pulls, scores)
    multiply(decay, scores)
    scale_columns(decay, dt[index])
    for j in range(0, width, HEIGHT):  # x_j is read by the queries from its own place on
        add_product(out, j, min(j + HEIGHT, width), p, decay.T, j, slope, j, max(m - j, 0))
    for j in range(width):
        steps[j, 0] = dt[index, j]
    add_product(row_sums, 0, m, 1, pulls, 0, steps, 0, width)
    add_column_sums(by_steps, pulls)
    for i in range(m):
        by_a[index, i] += row_sums[i, 0]
    for j in range(width):
        by_dt[index, j] += by_steps[j]
        by_a[index, j] -= by_steps[j] * dt[index, j]


@piece
def through_reads(a, index, state, queries_turned, slope_turned, queries_out, by_a):  # type: ignore[no-untyped-def]
    """A head's gradients through what its queries read of the state before the chunk."""
    compile_once()
    n, m = queries_turned.shape
    back, gains, total = zeros(n, m), np.empty(m, np.float32), np.zeros(m, np.float32)
    add_product(back, 0, n, m, state, 0, slope_turned, 0, len(slope_turned))
    add_dots(total, queries_turned, back)
    for i in range(m):
        gains[i] = exp(a[index, i])
        by_a[index, i] += gains[i] * total[i]
    add_scaled_columns(queries_out, back, gains)


@piece
def through_writes(dt, a, index, state, keys_turned, inputs_turned, keys_out, out, by_dt, by_a):  # type: ignore[no-untyped-def]
    """A head's gradients through what its places add to the state after the chunk; state is the loss's gradient by
    that, out by x."""
    compile_once()
    n, width = keys_turned.shape
    back, weighted = zeros(n, width), np.empty((n, width), np.float32)
    weights, total = np.empty(width, np.float32), np.zeros(width, np.float32)
    add_product(back, 0, n, width, state, 0, inputs_turned, 0, len(inputs_turned))
    add_dots(total, keys_turned, back)
    for j in range(width):
        decay = exp(a[index, width - 1] - a[index, j])
        weights[j] = decay * dt[index, j]
        by_dt[index, j] += decay * total[j]
        by_a[index, j] -= weights[j] * total[j]
        by_a[index, width - 1] += weights[j] * total[j]
    add_scaled_columns(keys_out, back, weights)
    load(weighted, keys_turned, 0, 0, n)
    scale_columns(weighted, weights)
    add_product(out, 0, width, state.shape[1], weighted.T, 0, state, 0, n)
