"""A few rows times a packed bfloat16 matrix, at the rate at which memory gives the matrix. Definition: `ops/linear.py`.

oneDNN's layout, as it packs matrices for AVX-512: blocks of OUTS outputs; in a block, for each pair of inputs, the
pair's weights for every output side by side. A 32-bit word holds a pair. The instruction adds the two products of a
pair to each of 16 float32 sums; pairs come in order, `depth` of them in one chain, and chains are added one after the
other: oneDNN's own order, hence its bits.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.pairs import ADDS_PAIRS
from nemotron_h.ops.jit.scalars import FEATURES, f, numba, to_bfloat16, u

OUTS = 64  # outputs of a block: four vectors
HEIGHT = 4  # rows whose sums stay in registers together
PAIRS_PADDED = 16  # a block's pairs are filled up to a multiple

# can this CPU do it? where there are tile registers oneDNN uses them for many rows, in another order
RUNS = ADDS_PAIRS and not FEATURES.get("amx-bf16", False)
if numba is not None:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    from nemotron_h.ops.jit.pairs import add_pairs

    SUMS, WORDS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)

    def chain(rows: int) -> Any:
        """For numba: out[:rows, :OUTS] += one chain over the pairs from begin to before end.

        x: words, `step` from row to row; weights: words, the block's own from `first` on; out (HEIGHT, OUTS) float32.
        """

        @intrinsic  # type: ignore[untyped-decorator]
        def add(typing, x, step, weights, first, begin, end, out):  # type: ignore[no-untyped-def]
            def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
                def address(argument, *place):  # type: ignore[no-untyped-def]
                    kind = signature.args[argument]
                    array = context.make_array(kind)(context, builder, args[argument])
                    return cgutils.get_item_pointer(context, builder, kind, array, list(place), wraparound=False)

                def load(where, kind):  # type: ignore[no-untyped-def]
                    loaded = builder.load(builder.bitcast(where, kind.as_pointer()))
                    loaded.align = 4  # that of a word
                    return loaded

                _, step, _, first, begin, end, _ = args
                word = begin.type
                vectors = OUTS // 16
                nothing, everywhere = ir.Constant(WORDS, ir.Undefined), ir.Constant(WORDS, None)
                zeros = ir.Constant(SUMS, [0.0] * 16)
                sums = [[cgutils.alloca_once_value(builder, zeros) for _ in range(vectors)] for _ in range(rows)]
                for own in sums:
                    for place in own:
                        builder.store(zeros, place)
                with cgutils.for_range_slice(builder, begin, end, word(1)) as (pair, _):
                    at = builder.add(first, builder.mul(pair, word(OUTS)))
                    some = [load(address(2, builder.add(at, word(16 * v))), WORDS) for v in range(vectors)]
                    for row, own in enumerate(sums):
                        value = builder.load(address(0, builder.add(builder.mul(step, word(row)), pair)))
                        value = builder.insert_element(nothing, value, ir.IntType(32)(0))
                        value = builder.shuffle_vector(value, nothing, everywhere)
                        for place, weight in zip(own, some, strict=True):
                            builder.store(add_pairs(builder, builder.load(place), value, weight), place)
                for row, own in enumerate(sums):
                    for v, place in enumerate(own):
                        where = address(6, word(row), word(16 * v))
                        total = builder.fadd(load(where, SUMS), builder.load(place))
                        builder.store(total, builder.bitcast(where, SUMS.as_pointer())).align = 4
                return context.get_dummy_value()

            return types.void(x, step, weights, first, begin, end, out), generate

        return add

    one, two, three, four = (chain(rows) for rows in range(1, HEIGHT + 1))


@kernel(1)
def few_rows(start: Any, stop: Any, x: Any, rows: Any, pairs: Any, weights: Any, depth: Any, out: Any) -> None:
    """x: rows of `pairs` words; weights: all blocks' words; depth: pairs of a chain; out (rows, outputs) bfloat16 bits.
    A task is one block of outputs."""
    tile = np.empty((HEIGHT, OUTS), np.float32)
    size = -(-pairs // PAIRS_PADDED) * PAIRS_PADDED * OUTS
    for task in range(start, stop):
        for row in range(0, rows, HEIGHT):
            count, own = min(HEIGHT, rows - row), x[row * pairs :]
            for i in range(count):
                for j in range(OUTS):
                    tile[i, j] = f(0)
            for begin in range(0, pairs, depth):
                end = min(begin + depth, pairs)
                if count == 1:
                    one(own, pairs, weights, task * size, begin, end, tile)
                elif count == 2:
                    two(own, pairs, weights, task * size, begin, end, tile)
                elif count == 3:
                    three(own, pairs, weights, task * size, begin, end, tile)
                else:
                    four(own, pairs, weights, task * size, begin, end, tile)
            for i in range(count):
                for j in range(min(OUTS, out.shape[1] - task * OUTS)):
                    out[u(row + i), u(task * OUTS + j)] = to_bfloat16(tile[i, j])
