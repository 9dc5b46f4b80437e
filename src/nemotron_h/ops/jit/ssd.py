"""The chunked scan, tile by tile in cache, and its gradient. Definition and formulas: `ops/ssd.py`.

Every matrix is two-dimensional and contiguous, its leading letters folded into rows:
    x (c h CHUNK, p)   y and its gradient (c m, h p)   dt, a (c h, CHUNK)
    B (c g n, CHUNK)   C (c g m, n)                    states (c h n, p)
x, B and C are float32 or bfloat16 bits, the rest float32. A state stands transposed, (n, p), so that every product
below adds scaled rows, `out[row] += factor * in[row]`, one term after the other: a query's bits depend on its own row
and on nothing around it. (contract: a multiplication and its addition are one instruction, in every lane alike.)
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.scalars import contracted, contracted_piece, exp, f, prange, read, write


@contracted_piece
def add_rows(out, factors, rows, count):  # type: ignore[no-untyped-def]
    """out += sum_k factors[k] * rows[k], k = 0..count-1 in this order."""
    width = len(out)
    whole = count // 4 * 4
    for k in range(0, whole, 4):
        f0, f1, f2, f3 = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
        r0, r1, r2, r3 = rows[k], rows[k + 1], rows[k + 2], rows[k + 3]
        for q in range(width):
            out[q] = (((out[q] + f0 * r0[q]) + f1 * r1[q]) + f2 * r2[q]) + f3 * r3[q]
    for k in range(whole, count):
        factor, row = factors[k], rows[k]
        for q in range(width):
            out[q] += factor * row[q]


@contracted_piece
def load(tile, array, first):  # type: ignore[no-untyped-def]
    """Fill a tile with the rows of an array from `first` on, as float32."""
    for i in range(tile.shape[0]):
        for j in range(tile.shape[1]):
            tile[i, j] = read(array, first + i, j)


@contracted_piece
def load_turned(tile, array, first):  # type: ignore[no-untyped-def]
    """The same, rows becoming columns."""
    for j in range(tile.shape[1]):
        for i in range(tile.shape[0]):
            tile[i, j] = read(array, first + j, i)


@contracted
def writes(x: Any, dt: Any, a: Any, B: Any, share: Any, out: Any) -> None:
    """out (c h n, p): what each chunk adds to the state by its end, sum_j exp(a_end - a_j) dt_j x_j B_j^T."""
    count, width = a.shape
    n, p = out.shape[0] // count, out.shape[1]
    for index in prange(count):
        tile, keys = np.empty((width, p), np.float32), np.empty((n, width), np.float32)
        load(tile, x, index * width)
        load(keys, B, index // share * n)
        weights = np.empty(width, np.float32)
        for j in range(width):
            weights[j] = exp(a[index, width - 1] - a[index, j]) * dt[index, j]
        factors = np.empty(width, np.float32)
        for k in range(n):
            for j in range(width):
                factors[j] = keys[k, j] * weights[j]
            row = out[index * n + k]
            row[:] = f(0)
            add_rows(row, factors, tile, width)


@contracted
def pass_on(added: Any, a: Any, first: Any, counts: Any, heads: Any, start: Any, before: Any) -> None:
    """before (c h n, p): the state at the beginning of each chunk, from start (s h n, p). first, counts (s,): chunks.

    The last chunk of a segment adds nothing to `before`; start is overwritten with the state before that chunk.
    """
    width = a.shape[1]
    n = start.shape[0] // (len(first) * heads)
    for task in prange(len(first) * heads):
        segment, head = task // heads, task % heads
        for chunk in range(first[segment], first[segment] + counts[segment]):
            index = chunk * heads + head
            last = chunk == first[segment] + counts[segment] - 1
            gain = exp(a[index, width - 1])
            for k in range(n):
                state, here = start[task * n + k], before[index * n + k]
                here[:] = state
                if not last:
                    more = added[index * n + k]
                    for q in range(len(state)):
                        state[q] = state[q] * gain + more[q]


@contracted
def outputs(
    x: Any, dt: Any, a: Any, B: Any, C: Any, skip: Any, before: Any, share: Any,
    places: Any, begins: Any, counts: Any, y: Any,
) -> None:  # fmt: skip
    """y (c m, h p). skip (h,): what each head adds of its own x. places (c,): where each chunk's queries begin;
    begins, counts (c,): which places are new; the other queries get zero."""
    total, width = a.shape
    p = x.shape[1]
    groups = total // share
    m, n = C.shape[0] // groups, C.shape[1]
    heads = total // len(places)
    for group in prange(groups):
        chunk = group * share // heads
        first = places[chunk]
        begin = begins[chunk] - first
        end = begin + counts[chunk]
        keys, tile = np.empty((n, width), np.float32), np.empty((width, p), np.float32)
        queries, scores = np.empty((m, n), np.float32), np.zeros((m, width), np.float32)
        factors, read_back, row = np.empty(width, np.float32), np.empty(p, np.float32), np.empty(p, np.float32)
        load(keys, B, group * n)
        load(queries, C, group * m)
        for i in range(begin, end):
            add_rows(scores[i], queries[i], keys, n)
        for index in range(group * share, (group + 1) * share):
            load(tile, x, index * width)
            column = index % heads * p
            for i in range(m):
                row[:] = f(0)
                if begin <= i < end:
                    top = a[index, first + i]
                    for j in range(width):
                        factors[j] = scores[i, j] * exp(top - a[index, j]) * dt[index, j]
                    add_rows(row, factors, tile, first + i + 1)
                    for q in range(p):
                        row[q] += skip[index % heads] * tile[first + i, q]
                    if len(before) > 0:
                        read_back[:] = f(0)
                        add_rows(read_back, queries[i], before[index * n : (index + 1) * n], n)
                        gain = exp(top)
                        for q in range(p):
                            row[q] += gain * read_back[q]
                y[chunk * m + i, column : column + p] = row


@contracted_piece
def load_head(tile, array, index, heads):  # type: ignore[no-untyped-def]
    """Fill a tile (CHUNK, p) with one head of one chunk of an array (c CHUNK, h p)."""
    width, p = tile.shape
    first, column = index // heads * width, index % heads * p
    for i in range(width):
        tile[i] = array[first + i, column : column + p]


@contracted
def states_gradient(a: Any, C: Any, grad: Any, share: Any, heads: Any, out: Any) -> None:
    """out (c h n, p): of the loss by the state before each chunk, through its queries. grad (c m, h p): by y."""
    count = len(a)
    m, n, p = len(grad) // (count // heads), C.shape[1], grad.shape[1] // heads
    for index in prange(count):
        queries, tile = np.empty((n, m), np.float32), np.empty((m, p), np.float32)
        load_head(tile, grad, index, heads)
        load_turned(queries, C, index // share * m)
        gains, factors = np.empty(m, np.float32), np.empty(m, np.float32)
        for i in range(m):
            gains[i] = exp(a[index, i])
        for k in range(n):
            for i in range(m):
                factors[i] = queries[k, i] * gains[i]
            row = out[index * n + k]
            row[:] = f(0)
            add_rows(row, factors, tile, m)


@contracted
def pass_back(before: Any, a: Any, first: Any, counts: Any, heads: Any, by_state: Any, by_a: Any) -> None:
    """by_state (c h n, p): in, of the loss by the state before each chunk through its queries; out, by what the chunk
    adds to the state. by_a (c h, CHUNK): the last place gets the part through the chunk's gain."""
    count, width = a.shape
    n, p = before.shape[0] // count, before.shape[1]
    for task in prange(len(first) * heads):
        segment, head = task // heads, task % heads
        behind = np.zeros((n, p), np.float32)  # by the state after the chunk at hand
        for step in range(counts[segment]):
            chunk = first[segment] + counts[segment] - 1 - step
            index = chunk * heads + head
            gain = exp(a[index, width - 1])
            total = np.zeros(p, np.float32)
            for k in range(n):
                here, state, after = by_state[index * n + k], before[index * n + k], behind[k]
                for q in range(p):
                    total[q] += after[q] * state[q]
                    direct = here[q]
                    here[q] = after[q]
                    after[q] = direct + gain * after[q]
            for q in range(p):
                by_a[index, width - 1] += gain * total[q]


@contracted
def gradient(
    x: Any, dt: Any, a: Any, B: Any, C: Any, skip: Any, before: Any, by_writes: Any, grad: Any, share: Any,
    by_x: Any, by_dt: Any, by_a: Any, by_B: Any, by_C: Any, by_skip: Any,
) -> None:  # fmt: skip
    """Of the loss by every input, the queries being a chunk's first m places. by_dt and by_a are added to;
    by_skip (c h,): each chunk's part."""
    total, width = a.shape
    groups = total // share
    m, n = len(C) // groups, C.shape[1]
    for group in prange(groups):
        keys, queries = np.empty((n, width), np.float32), np.empty((m, n), np.float32)
        load(keys, B, group * n)
        load(queries, C, group * m)
        scores, by_scores = np.zeros((m, width), np.float32), np.zeros((m, width), np.float32)
        for i in range(m):
            add_rows(scores[i], queries[i], keys, n)
        grad_keys, grad_queries = np.zeros((width, n), np.float32), np.zeros((m, n), np.float32)
        for index in range(group * share, (group + 1) * share):
            within_head(
                x, dt, a, skip, before, by_writes, grad, index, scores, queries, keys,
                by_scores, grad_keys, grad_queries, by_x, by_dt, by_a, by_skip,
            )  # fmt: skip
        turned = np.empty((width, n), np.float32)
        for j in range(width):
            for k in range(n):
                turned[j, k] = keys[k, j]
        column = np.empty(m, np.float32)
        for i in range(m):
            add_rows(grad_queries[i], by_scores[i], turned, i + 1)
            for k in range(n):
                write(by_C, group * m + i, k, grad_queries[i, k])
        for j in range(width):
            for i in range(m):
                column[i] = by_scores[i, j]
            add_rows(grad_keys[j], column, queries, m)  # by_scores is zero where a query lies before the place
            for k in range(n):
                write(by_B, group * n + k, j, grad_keys[j, k])


@contracted_piece
def within_head(  # type: ignore[no-untyped-def]
    x, dt, a, skip, before, by_writes, grad, index, scores, queries, keys,
    by_scores, grad_keys, grad_queries, by_x, by_dt, by_a, by_skip,
):  # fmt: skip
    """One head of one chunk: its share of by_scores, grad_keys and grad_queries; the others by its own inputs."""
    m, width, p, heads = len(queries), a.shape[1], x.shape[1], len(skip)
    tile, turned = np.empty((width, p), np.float32), np.empty((p, width), np.float32)
    load(tile, x, index * width)
    load_turned(turned, x, index * width)
    slope, out = np.empty((m, p), np.float32), np.zeros((width, p), np.float32)
    load_head(slope, grad, index, heads)

    own, lanes = skip[index % heads], np.zeros(p, np.float32)  # through what a query adds of its own x
    for i in range(m):
        for q in range(p):
            out[i, q] = own * slope[i, q]
            lanes[q] += tile[i, q] * slope[i, q]
    total = f(0)
    for q in range(p):
        total += lanes[q]
    by_skip[index] = total

    mixed = np.zeros((width, m), np.float32)  # mixed[j, i]: how much of x_j query i reads
    column, pulled = np.empty(width, np.float32), np.empty(width, np.float32)
    for i in range(m):  # through the products within the chunk
        column[:] = f(0)
        add_rows(column, slope[i], turned, p)  # by mixed[:, i]
        top = a[index, i]
        for j in range(width):
            gain = exp(top - a[index, j]) if j <= i else f(0)
            by_scores[i, j] += column[j] * gain * dt[index, j]
            by_dt[index, j] += column[j] * scores[i, j] * gain
            factor = scores[i, j] * gain * dt[index, j]
            pulled[j] = column[j] * factor
            by_a[index, j] -= pulled[j]
            mixed[j, i] = factor
        total = f(0)
        for j in range(width):
            total += pulled[j]
        by_a[index, i] += total
    for j in range(m):
        add_rows(out[j], mixed[j, j:], slope[j:], m - j)

    if len(before) > 0:
        through_states(
            dt, a, before, by_writes, index, queries, keys, tile, slope, grad_keys, grad_queries, out, by_dt, by_a
        )
    for j in range(width):
        for q in range(p):
            write(by_x, index * width + j, q, out[j, q])


@contracted_piece
def through_states(  # type: ignore[no-untyped-def]
    dt, a, before, by_writes, index, queries, keys, tile, slope, grad_keys, grad_queries, out, by_dt, by_a
):
    """The part of a head's gradients that goes through the states between chunks; out (CHUNK, p) is by x."""
    m, n = queries.shape
    width, p = tile.shape
    state, added = np.empty((p, n), np.float32), np.empty((p, n), np.float32)
    for k in range(n):
        for q in range(p):
            state[q, k] = before[index * n + k, q]
            added[q, k] = by_writes[index * n + k, q]
    back, weights = np.empty(n, np.float32), np.empty(width, np.float32)
    end = a[index, width - 1]
    for i in range(m):  # what queries read of the state before the chunk
        back[:] = f(0)
        add_rows(back, slope[i], state, p)
        gain, total = exp(a[index, i]), f(0)
        for k in range(n):
            grad_queries[i, k] += gain * back[k]
        for k in range(n):
            total += queries[i, k] * back[k]
        by_a[index, i] += gain * total
    for j in range(width):  # what places add to the state after it
        back[:] = f(0)
        add_rows(back, tile[j], added, p)
        decay, total = exp(end - a[index, j]), f(0)
        weights[j] = decay * dt[index, j]
        for k in range(n):
            grad_keys[j, k] += weights[j] * back[k]
        for k in range(n):
            total += keys[k, j] * back[k]
        by_dt[index, j] += decay * total
        by_a[index, j] -= weights[j] * total
        by_a[index, width - 1] += weights[j] * total
    factors = np.empty(n, np.float32)
    for j in range(width):
        for k in range(n):
            factors[k] = keys[k, j] * weights[j]
        add_rows(out[j], factors, by_writes[index * n : (index + 1) * n], n)
