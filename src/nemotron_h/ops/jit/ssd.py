"""The chunked scan, tile by tile in cache, and its gradient. Definition and formulas: `ops/ssd.py`.

Every matrix is two-dimensional and contiguous, its leading letters folded into rows:
    inputs (rows, h p + 2 g n): x | B | C       y and its gradient (rows, h p)       dt, a (c h, CHUNK)
    states (.. h n, p), turned                  kept x (s h CHUNK, p)                kept B (s g n, CHUNK), turned
inputs and what is kept of them are float32 or bfloat16 bits, the rest float32. owner, begins, counts, rows (c,): each
chunk's segment, the place of its first new row, how many there are, and where in the call. What the chunk at hand
already held stands before that place: what was kept.

A task is made of what `tiles.py` has and of loops over few arrays: of a few LLVM can tell that they do not overlap, and
makes vector code; of many it gives up.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.compiler import inline, one_copy, piece
from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.scalars import exp, f, read, u
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
    load_rows,
    load_turned,
    multiply,
    scale_columns,
    scale_rows,
    store,
    store_rows,
    zeros,
)

FADED = f(-60)  # the exponent of a decay that counts as nothing


@inline
def fade(x):  # type: ignore[no-untyped-def]
    """e^x; 0 where x is below FADED: beside what has not decayed a float32 sum could not show it, and its products soon
    sink below the numbers that float32 has in full, with which a CPU is far slower."""
    return f(0) if x < FADED else exp(x)


@kernel(2)
def score(
    start: Any, stop: Any, inputs: Any, first: Any, groups: Any, n: Any, owner: Any, begins: Any, counts: Any,
    rows: Any, kept: Any, out: Any,
) -> None:  # fmt: skip
    """out (rows, g CHUNK): each new row's C against the B of all places of its chunk; anything where there is none yet.
    first: the column of B."""
    width = kept.shape[1]
    keys, queries, tile = np.empty((n, width), np.float32), np.empty((width, n), np.float32), zeros(width, width)
    for task in range(start, stop):
        chunk, group = task // groups, task % groups
        begin, count, row = begins[chunk], counts[chunk], rows[chunk]
        if count == 0:
            continue
        load_rows(keys, kept, (owner[chunk] * groups + group) * n, 0, n if begin else 0, width)
        for j in range(count):
            for k in range(n):
                keys[k, begin + j] = read(inputs, row + j, first + group * n + k)
        load_rows(queries, inputs, row, first + (groups + group) * n, count, n)
        for i in range(count):
            for j in range(width):
                tile[i, j] = f(0)
        add_product(tile, 0, count, width, queries, 0, keys, 0, n)
        store_rows(out, row, group * width, tile, count)


@kernel(4)
def scan(
    start: Any, stop: Any, inputs: Any, groups: Any, scores: Any, dt: Any, a: Any, skip: Any, begins: Any, counts: Any,
    rows: Any, chunks: Any, kept_x: Any, kept_B: Any, boundary: Any, y: Any, before: Any,
) -> None:  # fmt: skip
    """y (rows, h p), one head of one segment a task. chunks (s, 2): each segment's first chunk and how many.

    boundary (s h n, p): in, the state before each segment's first chunk; out, before its last one; with no rows where
    all begin with zeros. before (c h n, p): filled with the state before each chunk, unless it has no rows.
    """
    heads, width = len(skip), a.shape[1]
    p = y.shape[1] // heads
    n = (inputs.shape[1] - y.shape[1]) // (2 * groups)
    state, own, out = np.empty((n, p), np.float32), np.empty((width, p), np.float32), np.empty((width, p), np.float32)
    factors, queries, keys = (
        np.empty((width, width), np.float32),
        np.empty((width, n), np.float32),
        np.empty((width, n), np.float32),
    )
    for task in range(start, stop):
        segment, head = task // heads, task % heads
        group, known = head // (heads // groups), len(boundary) > 0
        column = y.shape[1] + group * n  # of B
        if not known:
            clear(state)
        for chunk in range(chunks[segment, 0], chunks[segment, 0] + chunks[segment, 1]):
            begin, count, row, index = begins[chunk], counts[chunk], rows[chunk], chunk * heads + head
            last = chunk == chunks[segment, 0] + chunks[segment, 1] - 1
            load_rows(own, kept_x, task * width, 0, begin, p)
            for j in range(count):
                for q in range(p):
                    own[u(begin + j), u(q)] = read(inputs, row + j, head * p + q)
            decayed(factors, scores, row, group * width, dt, a, index, begin, count)
            for i in range(count):
                gain = skip[head]
                for q in range(p):
                    out[u(i), u(q)] = gain * own[u(begin + i), u(q)]
            add_causal_product(out, 0, count, factors, own, begin)
            load_rows(queries, inputs, row, column + groups * n, count, n)
            if known and chunk == chunks[segment, 0]:
                add_read(out, queries, a, index, begin, count, boundary, task * n)
                if len(before) > 0 or not last:
                    load_rows(state, boundary, task * n, 0, n, p)
            elif known or chunk > chunks[segment, 0]:
                add_read(out, queries, a, index, begin, count, state, 0)
            store_rows(y, row, head * p, out, count)
            if len(before) > 0:
                store(before, index * n, 0, state)
            if not last:
                for j in range(begin):
                    for k in range(n):
                        keys[j, k] = read(kept_B, (segment * groups + group) * n + k, j)
                for j in range(count):
                    for k in range(n):
                        keys[u(begin + j), u(k)] = read(inputs, row + j, column + k)
                move_on(state, keys, own, dt, a, index)
        if known and chunks[segment, 1] > 1:
            store(boundary, task * n, 0, state)


@piece
def decayed(factors, scores, row, column, dt, a, index, begin, count):  # type: ignore[no-untyped-def]
    """What each new row takes of the x of each place up to its own; what stands beyond is not read."""
    one_copy()
    for i in range(count):
        top, seen = a[index, begin + i], min((begin + i) // LANES * LANES + LANES, a.shape[1])
        for j in range(seen):
            factors[u(i), u(j)] = scores[u(row + i), u(column + j)] * fade(top - a[u(index), u(j)]) * dt[u(index), u(j)]


@piece
def add_read(out, queries, a, index, begin, count, state, first):  # type: ignore[no-untyped-def]
    """out[i] += fade(a_i) C_i . state; the queries are scaled by it."""
    one_copy()
    n = queries.shape[1]
    for i in range(count):
        gain = fade(a[index, begin + i])
        for k in range(n):
            queries[u(i), u(k)] *= gain
    add_product(out, 0, count, out.shape[1], queries, 0, state, first, n)


@piece
def move_on(state, keys, inputs, dt, a, index):  # type: ignore[no-untyped-def]
    """state = fade(a_end) state + sum_j fade(a_end - a_j) dt_j B_j x_j^T, over the places of a full chunk."""
    one_copy()
    width = a.shape[1]
    end, weights = a[index, width - 1], np.empty(width, np.float32)
    for j in range(width):
        weights[j] = fade(end - a[index, j]) * dt[index, j]
    scale_rows(inputs, weights)
    gain = fade(end)
    for k in range(state.shape[0]):
        for q in range(state.shape[1]):
            state[u(k), u(q)] *= gain
    add_product(state, 0, state.shape[0], state.shape[1], keys.T, 0, inputs, 0, width)


@kernel(1)
def keep(
    start: Any, stop: Any, inputs: Any, groups: Any, begins: Any, counts: Any, rows: Any, chunks: Any, kept_x: Any,
    kept_B: Any, dt: Any, kept_dt: Any,
) -> None:  # fmt: skip
    """The inputs of each segment's chunk at hand, to be there for the next call; zeros beyond them in a new chunk. And
    its steps, dt and kept_dt (.. h, CHUNK)."""
    width, p, heads = kept_B.shape[1], kept_x.shape[1], len(kept_dt) // len(chunks)
    n = (inputs.shape[1] - heads * p) // (2 * groups)
    for segment in range(start, stop):
        chunk = chunks[segment, 0] + chunks[segment, 1] - 1
        begin, count, row = begins[chunk], counts[chunk], rows[chunk]
        end = width if chunks[segment, 1] > 1 else begin + count
        for head in range(heads):
            own = segment * heads + head
            for j in range(width):
                kept_dt[own, u(j)] = dt[chunk * heads + head, u(j)]
            for j in range(begin, end):
                for q in range(p):
                    kept_x[own * width + j, q] = (
                        inputs[row + j - begin, head * p + q] if j < begin + count else inputs.dtype.type(0)
                    )
        for k in range(groups * n):
            for j in range(begin, end):
                kept_B[segment * groups * n + k, j] = (
                    inputs[row + j - begin, heads * p + k] if j < begin + count else inputs.dtype.type(0)
                )


@kernel(2)
def states_gradient(
    start: Any, stop: Any, inputs: Any, groups: Any, heads: Any, a: Any, counts: Any, rows: Any, grad: Any, out: Any
) -> None:
    """out (c h n, p): of the loss by the state before each chunk, through its queries. grad (rows, h p): by y."""
    m, p = a.shape[1], grad.shape[1] // heads
    n = (inputs.shape[1] - grad.shape[1]) // (2 * groups)
    queries, slope, added = np.empty((m, n), np.float32), np.empty((m, p), np.float32), zeros(n, p)
    gains = np.empty(m, np.float32)
    for index in range(start, stop):
        chunk, head = index // heads, index % heads
        clear(added)
        column = heads * p + (groups + head // (heads // groups)) * n
        load(queries, inputs, rows[chunk], column, counts[chunk])
        load(slope, grad, rows[chunk], head * p, counts[chunk])
        for i in range(m):
            gains[i] = fade(a[index, i])
        scale_rows(slope, gains)
        add_product(added, 0, n, p, queries.T, 0, slope, 0, m)
        store(out, index * n, 0, added)


@kernel(1)
def pass_back(start: Any, stop: Any, before: Any, a: Any, chunks: Any, heads: Any, by_state: Any, by_a: Any) -> None:
    """by_state (c h n, p): in, of the loss by the state before each chunk through its queries; out, by what the chunk
    adds to the state. by_a (c h, CHUNK): the last place gets the part through the chunk's gain."""
    count, width = a.shape
    n, p = before.shape[0] // count, before.shape[1]
    behind, total = zeros(n, p), np.empty(p, np.float32)  # behind: by the state after the chunk at hand
    for task in range(start, stop):
        segment, head = task // heads, task % heads
        clear(behind)
        for step in range(chunks[segment, 1]):
            index = (chunks[segment, 0] + chunks[segment, 1] - 1 - step) * heads + head
            gain = fade(a[index, width - 1])
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
    start: Any, stop: Any, inputs: Any, groups: Any, dt: Any, a: Any, skip: Any, counts: Any, rows: Any, before: Any,
    by_writes: Any, grad: Any, by_inputs: Any, by_dt: Any, by_a: Any, by_skip: Any,
) -> None:  # fmt: skip
    """Of the loss by every input, nothing having been kept. by_dt and by_a are added to; by_skip (c h,): each chunk's
    part."""
    m, heads = a.shape[1], len(skip)
    share, p = heads // groups, grad.shape[1] // heads
    n = (inputs.shape[1] - grad.shape[1]) // (2 * groups)
    keys, keys_turned = np.empty((m, n), np.float32), np.empty((n, m), np.float32)
    queries, queries_turned = np.empty((m, n), np.float32), np.empty((n, m), np.float32)
    own, own_turned = np.empty((m, p), np.float32), np.empty((p, m), np.float32)
    slope, slope_turned = np.empty((m, p), np.float32), np.empty((p, m), np.float32)
    for task in range(start, stop):
        chunk, group = task // groups, task % groups
        row, count = rows[chunk], counts[chunk]
        of_keys = heads * p + group * n
        of_queries = of_keys + groups * n
        load(keys, inputs, row, of_keys, count)
        load(queries, inputs, row, of_queries, count)
        load_turned(keys_turned, keys, 0, 0)
        load_turned(queries_turned, queries, 0, 0)
        scores, by_scores = zeros(m, m), zeros(m, m)
        add_product(scores, 0, m, m, queries, 0, keys_turned, 0, n)
        keys_out, queries_out = zeros(n, m), zeros(n, m)  # through the states, turned
        for head in range(group * share, (group + 1) * share):
            index = chunk * heads + head
            out, skipped = zeros(m, p), np.zeros(p, np.float32)
            load(own, inputs, row, head * p, count)
            load(slope, grad, row, head * p, count)
            load_turned(own_turned, own, 0, 0)
            load_turned(slope_turned, slope, 0, 0)
            add_dots(skipped, slope, own)
            by_skip[index] = f(0)
            for q in range(p):
                by_skip[index] += skipped[q]
            for i in range(m):
                for q in range(p):
                    out[i, q] = skip[head] * slope[i, q]
            within_chunk(dt, a, index, scores, own_turned, slope, by_scores, out, by_dt, by_a)
            if len(before) > 0:
                state = np.empty((n, p), np.float32)
                load(state, before, index * n, 0, n)
                through_reads(a, index, state, queries_turned, slope_turned, queries_out, by_a)
                load(state, by_writes, index * n, 0, n)
                through_writes(dt, a, index, state, keys_turned, own_turned, keys_out, out, by_dt, by_a)
            store_rows(by_inputs, row, head * p, out, count)
        by_keys, by_queries = np.empty((m, n), np.float32), np.empty((m, n), np.float32)
        load_turned(by_keys, keys_out, 0, 0)
        load_turned(by_queries, queries_out, 0, 0)
        add_product(by_keys, 0, m, n, by_scores.T, 0, queries, 0, m)
        add_product(by_queries, 0, m, n, by_scores, 0, keys, 0, m)
        store_rows(by_inputs, row, of_keys, by_keys, count)
        store_rows(by_inputs, row, of_queries, by_queries, count)


@piece
def within_chunk(dt, a, index, scores, inputs_turned, slope, by_scores, out, by_dt, by_a):  # type: ignore[no-untyped-def]
    """A head's gradients through what its queries read of their own chunk; out is the gradient by x."""
    one_copy()
    m, p = slope.shape
    width = inputs_turned.shape[1]
    decay, pulls = zeros(m, width), zeros(m, width)
    steps, by_steps, row_sums = np.empty((width, 1), np.float32), np.zeros(width, np.float32), zeros(m, 1)
    for i in range(m):
        for j in range(i + 1):
            decay[i, j] = fade(a[index, i] - a[index, j])
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
    one_copy()
    n, m = queries_turned.shape
    back, gains, total = zeros(n, m), np.empty(m, np.float32), np.zeros(m, np.float32)
    add_product(back, 0, n, m, state, 0, slope_turned, 0, len(slope_turned))
    add_dots(total, queries_turned, back)
    for i in range(m):
        gains[i] = fade(a[index, i])
        by_a[index, i] += gains[i] * total[i]
    add_scaled_columns(queries_out, back, gains)


@piece
def through_writes(dt, a, index, state, keys_turned, inputs_turned, keys_out, out, by_dt, by_a):  # type: ignore[no-untyped-def]
    """A head's gradients through what its places add to the state after the chunk; state is the loss's gradient by
    that, out by x."""
    one_copy()
    n, width = keys_turned.shape
    back, weighted = zeros(n, width), np.empty((n, width), np.float32)
    weights, total = np.empty(width, np.float32), np.zeros(width, np.float32)
    add_product(back, 0, n, width, state, 0, inputs_turned, 0, len(inputs_turned))
    add_dots(total, keys_turned, back)
    for j in range(width):
        decay = fade(a[index, width - 1] - a[index, j])
        weights[j] = decay * dt[index, j]
        by_dt[index, j] += decay * total[j]
        by_a[index, j] -= weights[j] * total[j]
        by_a[index, width - 1] += weights[j] * total[j]
    add_scaled_columns(keys_out, back, weights)
    load(weighted, keys_turned, 0, 0, n)
    scale_columns(weighted, weights)
    add_product(out, 0, width, state.shape[1], weighted.T, 0, state, 0, n)
