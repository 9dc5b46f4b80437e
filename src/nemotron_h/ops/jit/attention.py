"""Queries against the blocks of keys that they see, with a running softmax. Definition: `ops/attention.py`.

q, out (rows, f d) float32 or bfloat16 bits; keys (pages k d, BLOCK) and values (pages k BLOCK, d) of the same kind, or
int8 with scales (pages 2 k, BLOCK): keys stand turned, one row a channel. A task is one key head and one piece of
queries that lie in one block; the query heads that read that key head are rows of one product. A row's numbers depend
on its own place alone: blocks come in order, each element of a product is one chain of sums.

In bfloat16, a CPU that can takes channels, and then keys, by pairs (`pairs.py`), the products at twice the rate: the
scores are as exact as before; the weights are rounded to bfloat16, but that of a last key without a pair.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.compiler import one_copy, piece
from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.lanes import top, total
from nemotron_h.ops.jit.pairs import load_pairs
from nemotron_h.ops.jit.scalars import LANES, exp, f, read, to_bfloat16, u, write
from nemotron_h.ops.jit.tiles import HEIGHT, add_product, clear, load_rows


@kernel(1)
def attend(
    start: Any, stop: Any, q: Any, keys: Any, values: Any, scales: Any, table: Any, owner: Any, rows: Any, counts: Any,
    positions: Any, heads: Any, out: Any,
) -> None:  # fmt: skip
    """table (s, blocks): the pages of each sequence; owner, rows, counts, positions (pieces,): each piece's sequence,
    first row, number of queries and the place of the first. heads: of keys. scales: none where keys are no codes."""
    d, size = values.shape[1], keys.shape[1]
    group, most = q.shape[1] // d // heads, max(counts) * (q.shape[1] // d // heads)
    queries, scores = np.empty((most, d), np.float32), np.empty((most, size), np.float32)
    block_keys, block_values = np.empty((d, size), np.float32), np.empty((size, d), np.float32)
    attended, seen = np.empty((most, d), np.float32), np.empty(most, np.int64)
    tops, sums = np.empty(most, np.float32), np.empty(most, np.float32)
    scale = f(1) / np.sqrt(f(d))
    for task in range(start, stop):
        part, head = task // heads, task % heads
        row, first, m = rows[part], positions[part], counts[part] * group
        if m == 0:
            continue
        for i in range(m):
            column = (head * group + i % group) * d
            for c in range(d):
                queries[i, c] = read(q, row + i // group, column + c)
            tops[i], sums[i] = -np.inf, f(0)
        clear(attended[:m])
        for block in range(first // size + 1):
            page = table[owner[part], block] * heads + head
            for i in range(m):
                seen[i] = min(first + i // group + 1 - block * size, size)
            load_rows(block_keys, keys, page * d, 0, d, -(-seen[m - 1] // LANES) * LANES)
            load_rows(block_values, values, page * size, 0, seen[m - 1], d)
            of_keys = table[owner[part], block] * 2 * heads + head
            for i in range(0, m, HEIGHT):
                end = min(i + HEIGHT, m)
                width = -(-seen[end - 1] // LANES) * LANES
                score(scores, i, end, width, queries, block_keys)
                if len(scales) > 0:
                    times(scores, i, end, seen, scales[of_keys])
                weigh(scores, i, end, scale, seen, width, tops, sums, attended)
                if len(scales) > 0:
                    times(scores, i, end, seen, scales[of_keys + heads])
                add_product(attended, i, end, d, scores, 0, block_values, 0, seen[i])
                for k in range(i + 1, end):
                    add_product(attended, k, k + 1, d, scores, seen[i], block_values, seen[i], seen[k] - seen[i])
        for i in range(m):
            column = (head * group + i % group) * d
            for c in range(d):
                write(out, row + i // group, column + c, attended[i, c] / sums[i])


@kernel(1)
def attend_pairs(
    start: Any, stop: Any, q: Any, keys: Any, values: Any, table: Any, owner: Any, rows: Any, counts: Any,
    positions: Any, heads: Any, out: Any,
) -> None:  # fmt: skip
    """The same of bfloat16 with an even d, by pairs. q (rows, f d / 2): words."""
    d, size = values.shape[1], keys.shape[1]
    group, most = q.shape[1] * 2 // d // heads, max(counts) * (q.shape[1] * 2 // d // heads)
    queries, scores = np.empty((most, d // 2), np.uint32), np.empty((most, size), np.float32)
    weights = np.empty((most, size // 2), np.uint32)
    halves = weights.view(np.uint16)
    block_keys, block_values = np.empty((d // 2, size), np.uint32), np.empty((size // 2, d), np.uint32)
    attended, seen = np.empty((most, d), np.float32), np.empty(most, np.int64)
    tops, sums = np.empty(most, np.float32), np.empty(most, np.float32)
    scale = f(1) / np.sqrt(f(d))
    for task in range(start, stop):
        part, head = task // heads, task % heads
        row, first, m = rows[part], positions[part], counts[part] * group
        if m == 0:
            continue
        for i in range(m):
            column = (head * group + i % group) * (d // 2)
            for c in range(d // 2):
                queries[i, c] = q[row + i // group, column + c]
            tops[i], sums[i] = -np.inf, f(0)
        clear(attended[:m])
        for block in range(first // size + 1):
            page = table[owner[part], block] * heads + head
            for i in range(m):
                seen[i] = min(first + i // group + 1 - block * size, size)
            load_pairs(block_keys, keys, page * d, 0, d // 2, -(-seen[m - 1] // LANES) * LANES)
            load_pairs(block_values, values, page * size, 0, seen[m - 1] // 2, d)
            for i in range(0, m, HEIGHT):
                end = min(i + HEIGHT, m)
                width = -(-seen[end - 1] // LANES) * LANES
                score(scores, i, end, width, queries, block_keys)
                weigh(scores, i, end, scale, seen, width, tops, sums, attended)
                narrow(halves, scores, i, end, width)
                common = seen[i] // 2
                add_product(attended, i, end, d, weights, 0, block_values, 0, common)
                for k in range(i + 1, end):
                    add_product(attended, k, k + 1, d, weights, common, block_values, common, seen[k] // 2 - common)
                for k in range(i, end):
                    if seen[k] % 2:  # its last key has no pair yet: what lies later is not even read
                        last = seen[k] - 1
                        for c in range(d):
                            attended[k, c] += scores[k, last] * read(values, page * size + last, c)
        for i in range(m):
            column = (head * group + i % group) * d
            for c in range(d):
                write(out, row + i // group, column + c, attended[i, c] / sums[i])


@kernel(32)
def keep(start: Any, stop: Any, k: Any, v: Any, pages: Any, places: Any, keys: Any, values: Any) -> None:
    """k, v (rows, heads d): row t goes to its page and its place there; to none where the page is -1."""
    d, size = values.shape[1], keys.shape[1]
    heads = k.shape[1] // d
    for t in range(start, stop):
        for head in range(heads if pages[t] >= 0 else 0):
            page = pages[t] * heads + head
            for c in range(d):
                keys[page * d + c, places[t]] = k[t, head * d + c]
                values[page * size + places[t], c] = v[t, head * d + c]


@kernel(32)
def keep_rounded(
    start: Any, stop: Any, k: Any, v: Any, pages: Any, places: Any, keys: Any, values: Any, scales: Any, levels: Any
) -> None:
    """The same in int8: a row of a head becomes codes of -levels..levels and a scale."""
    d, size = values.shape[1], keys.shape[1]
    heads = k.shape[1] // d
    for t in range(start, stop):
        for head in range(heads if pages[t] >= 0 else 0):
            page, place = pages[t] * heads + head, places[t]
            of_key, of_value = largest(k, t, head * d, d) / levels, largest(v, t, head * d, d) / levels
            for c in range(d):
                keys[page * d + c, place] = code(read(k, t, head * d + c), of_key, levels)
                values[page * size + place, c] = code(read(v, t, head * d + c), of_value, levels)
            scales[(pages[t] * 2) * heads + head, place] = of_key
            scales[(pages[t] * 2 + 1) * heads + head, place] = of_value


@piece
def code(x, scale, levels):  # type: ignore[no-untyped-def]
    """x in int8, nearest; 0 of what is no number, whose scale says so."""
    one_copy()
    steps = np.rint(x / scale) if scale > 0 and not np.isnan(x) else f(0)
    return np.int8(min(max(steps, -levels), levels))


@piece
def largest(rows, t, column, count):  # type: ignore[no-untyped-def]
    """The largest magnitude in a part of a row; NaN where there is one."""
    one_copy()
    found = f(0)
    for c in range(count):
        size = abs(read(rows, t, column + c))
        found = found if found >= size or np.isnan(found) else size
    return found


@piece
def times(scores, begin, end, seen, scales):  # type: ignore[no-untyped-def]
    """scores[i, j] *= scales[j], of what row i sees"""
    one_copy()
    for i in range(begin, end):
        for j in range(seen[i]):
            scores[i, j] *= scales[j]


@piece
def narrow(halves, scores, begin, end, width):  # type: ignore[no-untyped-def]
    """The first numbers of these rows as bfloat16 bits."""
    one_copy()
    for i in range(begin, end):
        for j in range(width):
            halves[u(i), u(j)] = to_bfloat16(scores[u(i), u(j)])


@piece
def score(scores, begin, end, width, queries, keys):  # type: ignore[no-untyped-def]
    """scores[i, :width] = queries[i] . keys, begin <= i < end"""
    one_copy()
    for i in range(begin, end):
        for j in range(width):
            scores[i, j] = f(0)
    add_product(scores, begin, end, width, queries, 0, keys, 0, keys.shape[0])


@piece
def weigh(scores, begin, end, scale, seen, width, tops, sums, out):  # type: ignore[no-untyped-def]
    """These rows' scores of a block, to be scaled, become weights by the largest score so far; what was summed before,
    too."""
    one_copy()
    size, line = scores.shape[1], scores.reshape(-1)
    for i in range(begin, end):
        largest = max(tops[i], top(line, i * size, i * size + seen[i]))
        gain, tops[i] = exp((tops[i] - largest) * scale), largest
        sums[i] *= gain
        for c in range(out.shape[1]):
            out[u(i), u(c)] *= gain
    for i in range(begin, end):
        largest = tops[i]
        for j in range(seen[i]):
            scores[u(i), u(j)] = exp((scores[u(i), u(j)] - largest) * scale)
        for j in range(seen[i], width):
            scores[u(i), u(j)] = f(0)
        sums[i] += total(line, i * size, i * size + width)
