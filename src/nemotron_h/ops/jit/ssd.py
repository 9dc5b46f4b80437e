"""The chunked scan, tile by tile in cache, and its gradient. Definition and formulas: `ops/ssd.py`.

Every matrix is two-dimensional and contiguous, its leading letters folded into rows:
    x, y (c h CHUNK, p)   dt, a (c h, CHUNK)   B (c g n, CHUNK)   C (c g m, n)   states (c h n, p)
x, B and C are float32 or bfloat16 bits, the rest float32. A state stands transposed, (n, p), so that every product
below adds scaled rows, `out[row] += factor * in[row]`, one term after the other: a query's bits depend on its own row
and on nothing around it. (contract: a multiplication and its addition are one instruction, in every lane alike.)
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.scalars import contracted, contracted_inline, exp, f, prange, read, write


@contracted_inline
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


@contracted_inline
def load(tile, array, first):  # type: ignore[no-untyped-def]
    """Fill a tile with the rows of an array from `first` on, as float32."""
    for i in range(tile.shape[0]):
        for j in range(tile.shape[1]):
            tile[i, j] = read(array, first + i, j)


@contracted_inline
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
    x: Any, dt: Any, a: Any, B: Any, C: Any, before: Any, share: Any, places: Any, begins: Any, counts: Any, y: Any
) -> None:
    """y (c h m, p). places (c,): where each chunk's queries begin; begins, counts (c,): which are new; others get zero."""
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
        factors, read_back = np.empty(width, np.float32), np.empty(p, np.float32)
        load(keys, B, group * n)
        load(queries, C, group * m)
        for i in range(begin, end):
            add_rows(scores[i], queries[i], keys, n)
        for index in range(group * share, (group + 1) * share):
            load(tile, x, index * width)
            for i in range(m):
                row = y[index * m + i]
                row[:] = f(0)
                if i < begin or i >= end:
                    continue
                top = a[index, first + i]
                for j in range(width):
                    factors[j] = scores[i, j] * exp(top - a[index, j]) * dt[index, j]
                add_rows(row, factors, tile, first + i + 1)
                if len(before) > 0:
                    read_back[:] = f(0)
                    add_rows(read_back, queries[i], before[index * n : (index + 1) * n], n)
                    gain = exp(top)
                    for q in range(p):
                        row[q] += gain * read_back[q]


@contracted
def states_gradient(a: Any, C: Any, grad: Any, share: Any, out: Any) -> None:
    """out (c h n, p): of the loss by the state before each chunk, through its queries. grad (c h CHUNK, p): by y."""
    count, width = a.shape
    n, _p = C.shape[1], grad.shape[1]
    for index in prange(count):
        queries, tile = np.empty((n, width), np.float32), grad[index * width : (index + 1) * width]
        load_turned(queries, C, index // share * width)
        gains, factors = np.empty(width, np.float32), np.empty(width, np.float32)
        for i in range(width):
            gains[i] = exp(a[index, i])
        for k in range(n):
            for i in range(width):
                factors[i] = queries[k, i] * gains[i]
            row = out[index * n + k]
            row[:] = f(0)
            add_rows(row, factors, tile, width)


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
    x: Any, dt: Any, a: Any, B: Any, C: Any, before: Any, by_writes: Any, grad: Any, share: Any,
    by_x: Any, by_dt: Any, by_a: Any, by_B: Any, by_C: Any,
) -> None:  # fmt: skip
    """Of the loss by every input, where every place of a chunk is a query. by_dt and by_a are added to."""
    total, width = a.shape
    groups = total // share
    n, _p = C.shape[1], x.shape[1]
    for group in prange(groups):
        keys, queries = np.empty((n, width), np.float32), np.empty((width, n), np.float32)
        load(keys, B, group * n)
        load(queries, C, group * width)
        scores, by_scores = np.zeros((width, width), np.float32), np.zeros((width, width), np.float32)
        for i in range(width):
            add_rows(scores[i], queries[i], keys, n)
        grad_keys, grad_queries = np.zeros((width, n), np.float32), np.zeros((width, n), np.float32)
        for index in range(group * share, (group + 1) * share):
            within_head(
                x, dt, a, before, by_writes, grad, index, scores, queries, keys,
                by_scores, grad_keys, grad_queries, by_x, by_dt, by_a,
            )  # fmt: skip
        turned = np.empty((width, n), np.float32)
        for j in range(width):
            for k in range(n):
                turned[j, k] = keys[k, j]
        column = np.empty(width, np.float32)
        for i in range(width):
            add_rows(grad_queries[i], by_scores[i], turned, i + 1)
            for j in range(width):
                column[j] = by_scores[j, i]
            add_rows(grad_keys[i], column, queries, width)  # by_scores is zero where a query lies before the place
        for i in range(width):
            for k in range(n):
                by_C[group * width + i, k] = grad_queries[i, k]
                by_B[group * n + k, i] = grad_keys[i, k]


@contracted_inline
def within_head(  # type: ignore[no-untyped-def]
    x, dt, a, before, by_writes, grad, index, scores, queries, keys,
    by_scores, grad_keys, grad_queries, by_x, by_dt, by_a,
):  # fmt: skip
    """One head of one chunk: its share of by_scores, grad_keys and grad_queries; by_x, by_dt and by_a of its own."""
    width, n, p = a.shape[1], keys.shape[0], x.shape[1]
    tile, turned = np.empty((width, p), np.float32), np.empty((p, width), np.float32)
    load(tile, x, index * width)
    load_turned(turned, x, index * width)
    out = np.zeros((width, p), np.float32)
    mixed = np.zeros((width, width), np.float32)  # mixed[j, i]: how much of x_j query i reads
    column, pulled = np.empty(width, np.float32), np.empty(width, np.float32)
    slope = grad[index * width : (index + 1) * width]

    for i in range(width):  # through the products within the chunk
        column[:] = f(0)
        add_rows(column, slope[i], turned, p)  # by mixed[:, i]
        top, total = a[index, i], f(0)
        for j in range(width):
            gain = exp(top - a[index, j]) if j <= i else f(0)
            read_dt = scores[i, j] * gain * dt[index, j]
            by_scores[i, j] += column[j] * gain * dt[index, j]
            by_dt[index, j] += column[j] * scores[i, j] * gain
            pulled[j] = column[j] * read_dt
            by_a[index, j] -= pulled[j]
            mixed[j, i] = read_dt
        for j in range(width):
            total += pulled[j]
        by_a[index, i] += total
    for j in range(width):
        add_rows(out[j], mixed[j, j:], slope[j:], width - j)

    if len(before) > 0:
        state, added = np.empty((p, n), np.float32), np.empty((p, n), np.float32)
        for k in range(n):
            for q in range(p):
                state[q, k] = before[index * n + k, q]
                added[q, k] = by_writes[index * n + k, q]
        back, weights = np.empty(n, np.float32), np.empty(width, np.float32)
        end = a[index, width - 1]
        for i in range(width):  # through what queries read of the state before the chunk
            back[:] = f(0)
            add_rows(back, slope[i], state, p)
            gain, total = exp(a[index, i]), f(0)
            for k in range(n):
                grad_queries[i, k] += gain * back[k]
                total += queries[i, k] * back[k]
            by_a[index, i] += gain * total
        for j in range(width):  # through what places add to the state after it
            back[:] = f(0)
            add_rows(back, tile[j], added, p)
            decay, total = exp(end - a[index, j]), f(0)
            weights[j] = decay * dt[index, j]
            for k in range(n):
                grad_keys[j, k] += weights[j] * back[k]
                total += keys[k, j] * back[k]
            by_dt[index, j] += decay * total
            by_a[index, j] -= weights[j] * total
            by_a[index, width - 1] += weights[j] * total
        factors = np.empty(n, np.float32)
        for j in range(width):
            for k in range(n):
                factors[k] = keys[k, j] * weights[j]
            add_rows(out[j], factors, by_writes[index * n : (index + 1) * n], n)
    for j in range(width):
        for q in range(p):
            write(by_x, index * width + j, q, out[j, q])
