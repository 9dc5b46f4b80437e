"""A few rows times a packed bfloat16 matrix, at the rate at which memory gives the matrix. Definition: `ops/linear.py`.

Many rows need the CPU for as long as the matrix needs to arrive. So all rows are multiplied by a piece of a block that
stays in the nearest cache, and meanwhile memory is asked for the next piece.

oneDNN's layout, as it packs matrices for AVX-512: blocks of OUTS outputs; in a block, for each pair of inputs, the
pair's weights for every output side by side. A 32-bit word holds a pair. The instruction adds the two products of a
pair to each of 16 float32 sums; pairs come in order, `depth` of them in one chain, and chains are added one after the
other: oneDNN's own order, hence its bits.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.blocks import LINE, OUTS
from nemotron_h.ops.jit.compiler import FEATURES, numba
from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.pairs import ADDS_PAIRS
from nemotron_h.ops.jit.scalars import to_bfloat16, u
from nemotron_h.ops.jit.tiles import clear

VECTOR = 16  # sums of a vector
HEIGHT = 4  # rows whose sums stay in registers together
NEAR = 64  # pairs of a block that all rows are multiplied by before the next ones
PAIRS_PADDED = 16  # a block's pairs are filled up to a multiple

TILES = FEATURES.get("amx-bf16", False)
PRODUCTS = ADDS_PAIRS or TILES  # has this CPU products of bfloat16?
RUNS = ADDS_PAIRS and not TILES  # can it do this? with tile registers oneDNN sums many rows in another order
if numba is not None:
    from llvmlite import ir

    from nemotron_h.ops.jit.blocks import block_sums
    from nemotron_h.ops.jit.pairs import add_pairs

    one, two, three, four = (
        block_sums(rows, OUTS, ir.VectorType(ir.FloatType(), VECTOR), add_pairs) for rows in range(1, HEIGHT + 1)
    )


@kernel(1)
def few_rows(start: Any, stop: Any, x: Any, rows: Any, pairs: Any, weights: Any, depth: Any, out: Any) -> None:
    """x: rows of `pairs` words; weights: all blocks' words; depth: pairs of a chain; out (rows, outputs) bfloat16 bits.
    A task is one block of outputs."""
    overlaps = rows > 3 * HEIGHT  # fewer wait for memory whatever is done: they ask for what they read
    near = NEAR if overlaps else depth
    sums, totals = np.empty((rows, OUTS), np.float32), np.empty((rows, OUTS), np.float32)
    size = -(-pairs // PAIRS_PADDED) * PAIRS_PADDED * OUTS
    for task in range(start, stop):
        clear(totals)
        for begin in range(0, pairs, depth):
            end = min(begin + depth, pairs)
            clear(sums)
            for first in range(begin, end, near):
                last = min(first + near, end)
                following = task * size + (first + near * overlaps) * OUTS
                for row in range(0, rows, HEIGHT):
                    count = min(HEIGHT, rows - row)
                    ahead = min(following + row // HEIGHT * near * LINE, len(weights) - near * LINE)
                    if count == 1:
                        one(x, pairs, weights, task * size, first, last, weights, ahead, sums, row, 0)
                    elif count == 2:
                        two(x, pairs, weights, task * size, first, last, weights, ahead, sums, row, 0)
                    elif count == 3:
                        three(x, pairs, weights, task * size, first, last, weights, ahead, sums, row, 0)
                    else:
                        four(x, pairs, weights, task * size, first, last, weights, ahead, sums, row, 0)
            for i in range(rows):
                for j in range(OUTS):
                    totals[i, j] += sums[i, j]
        for i in range(rows):
            for j in range(min(OUTS, out.shape[1] - task * OUTS)):
                out[u(i), u(task * OUTS + j)] = to_bfloat16(totals[i, j])
