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

from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.pairs import ADDS_PAIRS
from nemotron_h.ops.jit.scalars import FEATURES, numba, to_bfloat16, u
from nemotron_h.ops.jit.tiles import clear

VECTOR = 16  # sums or words of a vector, and words of a line of the cache
OUTS = 4 * VECTOR  # outputs of a block
HEIGHT = 4  # rows whose sums stay in registers together
NEAR = 64  # pairs of a block that all rows are multiplied by before the next ones
PAIRS_PADDED = 16  # a block's pairs are filled up to a multiple

# can this CPU do it? where there are tile registers oneDNN uses them for many rows, in another order
RUNS = ADDS_PAIRS and not FEATURES.get("amx-bf16", False)
if numba is not None:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    from nemotron_h.ops.jit.pairs import add_pairs

    SUMS, WORDS = ir.VectorType(ir.FloatType(), VECTOR), ir.VectorType(ir.IntType(32), VECTOR)

    def part_of_chain(rows: int) -> Any:
        """For numba: sums[row : row + rows, :OUTS] goes on over the pairs from begin to before end.

        x: words, `step` from row to row; weights: words, the block's own from `first` on; ahead: the word from which on
        memory is asked for what comes next, a line of the cache for each pair; sums (rows, OUTS) float32.
        """

        @intrinsic  # type: ignore[untyped-decorator]
        def add(typing, x, step, weights, first, begin, end, ahead, sums, row):  # type: ignore[no-untyped-def]
            def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
                def address(argument, *place):  # type: ignore[no-untyped-def]
                    kind = signature.args[argument]
                    array = context.make_array(kind)(context, builder, args[argument])
                    return cgutils.get_item_pointer(context, builder, kind, array, list(place), wraparound=False)

                def load(where, kind):  # type: ignore[no-untyped-def]
                    loaded = builder.load(builder.bitcast(where, kind.as_pointer()))
                    loaded.align = 4  # that of a word
                    return loaded

                _, step, _, first, begin, end, ahead, _, row = args
                word, number = begin.type, ir.IntType(32)
                nothing, everywhere = ir.Constant(WORDS, ir.Undefined), ir.Constant(WORDS, None)
                vectors = [word(place) for place in range(0, OUTS, VECTOR)]
                lines = [builder.add(row, word(r)) for r in range(rows)]
                places = [[address(7, line, vector) for vector in vectors] for line in lines]
                totals = [[cgutils.alloca_once_value(builder, load(place, SUMS)) for place in line] for line in places]
                asking = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
                ask = cgutils.get_or_insert_function(builder.module, asking, "llvm.prefetch.p0i8")
                to_read, soon, data = number(0), number(2), number(1)
                with cgutils.for_range_slice(builder, begin, end, word(1)) as (pair, _):
                    later = builder.add(ahead, builder.mul(builder.sub(pair, begin), word(VECTOR)))
                    builder.call(ask, [builder.bitcast(address(2, later), cgutils.voidptr_t), to_read, soon, data])
                    at = builder.add(first, builder.mul(pair, word(OUTS)))
                    some = [load(address(2, builder.add(at, vector)), WORDS) for vector in vectors]
                    for line, own in zip(lines, totals, strict=True):
                        value = builder.load(address(0, builder.add(builder.mul(step, line), pair)))
                        value = builder.insert_element(nothing, value, number(0))
                        value = builder.shuffle_vector(value, nothing, everywhere)
                        for total, weight in zip(own, some, strict=True):
                            builder.store(add_pairs(builder, builder.load(total), value, weight), total)
                for line, own in zip(places, totals, strict=True):
                    for place, total in zip(line, own, strict=True):
                        builder.store(builder.load(total), builder.bitcast(place, SUMS.as_pointer())).align = 4
                return context.get_dummy_value()

            return types.void(x, step, weights, first, begin, end, ahead, sums, row), generate

        return add

    one, two, three, four = (part_of_chain(rows) for rows in range(1, HEIGHT + 1))


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
                    ahead = min(following + row // HEIGHT * near * VECTOR, len(weights) - near * VECTOR)
                    if count == 1:
                        one(x, pairs, weights, task * size, first, last, ahead, sums, row)
                    elif count == 2:
                        two(x, pairs, weights, task * size, first, last, ahead, sums, row)
                    elif count == 3:
                        three(x, pairs, weights, task * size, first, last, ahead, sums, row)
                    else:
                        four(x, pairs, weights, task * size, first, last, ahead, sums, row)
            for i in range(rows):
                for j in range(OUTS):
                    totals[i, j] += sums[i, j]
        for i in range(rows):
            for j in range(min(OUTS, out.shape[1] - task * OUTS)):
                out[u(i), u(task * OUTS + j)] = to_bfloat16(totals[i, j])
