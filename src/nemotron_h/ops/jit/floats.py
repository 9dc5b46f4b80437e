"""Any number of rows times a matrix of float32 or bfloat16, in float32. Definition: `ops/linear.py`.

    sum = x[t, i] w[o, i] + sum, rounded once, for CHAIN inputs i one after the other; then total = total + sum

An output of a row is these chains of fused multiply-adds, however many rows there are: its bits depend on that row
alone. In a chain inputs come in the order in which few rows read a block (`blocks.py`): the first word of each part,
then the second ones. bfloat16, two inputs a word, is widened on its way, which is exact: it needs no instructions of
its own, and half the bytes are read. Few rows widen words in registers and take as long as the matrix needs to arrive.
For more, x is laid out in that order, and so is a piece of a block at a time, in the nearest cache, once for all rows.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.blocks import OUTS, STREAMS
from nemotron_h.ops.jit.compiler import FEATURES, inline, numba, one_copy, piece
from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.scalars import f, read, u, write
from nemotron_h.ops.jit.tiles import clear, zeros

CHAIN = 1024  # inputs: rounding errors of longer chains would show in float32
NEAR = 128  # inputs of a block that all rows are multiplied by before the next ones
FEW = 12  # rows that wait for memory
HEIGHT = 6  # rows whose sums stay in registers together
VECTOR = 16 if FEATURES.get("avx512f", False) else 8  # sums of a vector
WIDTH = 4 * VECTOR if VECTOR == 16 else 2 * VECTOR  # outputs of them, as far as there are registers

if numba is not None:
    from llvmlite import ir
    from numba.core import cgutils

    from nemotron_h.ops.jit.blocks import rows_sums
    from nemotron_h.ops.jit.scalars import as_bits

    SUMS = ir.VectorType(ir.FloatType(), VECTOR)

    def add_floats(builder: Any, sums: Any, a: Any, b: Any) -> Any:
        """LLVM's value of a b + sums; a and b: words that are float32."""
        kind = ir.FunctionType(SUMS, [SUMS] * 3)
        fused = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{VECTOR}f32")
        return builder.call(fused, [builder.bitcast(a, SUMS), builder.bitcast(b, SUMS), sums])

    def add_widened(builder: Any, sums: Any, a: Any, b: Any) -> Any:
        """The same for words that are pairs of bfloat16: the low ones, then the high ones."""
        half, high = (ir.Constant(a.type, [value] * VECTOR) for value in (16, 0xFFFF0000))
        sums = add_floats(builder, sums, builder.shl(a, half), builder.shl(b, half))
        return add_floats(builder, sums, builder.and_(a, high), builder.and_(b, high))

    add_many = rows_sums(SUMS, WIDTH, add_floats, HEIGHT)
    add_few = rows_sums(SUMS, WIDTH, add_floats, streams=STREAMS)
    add_few_pairs = rows_sums(SUMS, WIDTH, add_widened, streams=STREAMS)


@inline
def word_at(place, part):  # type: ignore[no-untyped-def]
    """Which word of a chain, in whose STREAMS parts are so many each, comes at a place of that order."""
    return place % STREAMS * part + place // STREAMS if place < part * STREAMS else place


@piece
def end_chain(totals, sums):  # type: ignore[no-untyped-def]
    """totals += sums, which begin anew."""
    one_copy()
    for i in range(sums.shape[0]):
        for j in range(OUTS):
            totals[u(i), u(j)] += sums[u(i), u(j)]
            sums[u(i), u(j)] = f(0)


@piece
def store_block(out, task, totals):  # type: ignore[no-untyped-def]
    """The block's outputs; totals begin anew."""
    one_copy()
    for i in range(totals.shape[0]):
        for j in range(min(OUTS, out.shape[1] - task * OUTS)):
            write(out, i, task * OUTS + j, totals[u(i), u(j)])
    clear(totals)


@kernel(1)
def few_floats_times(start: Any, stop: Any, x: Any, words: Any, out: Any) -> None:
    """x (rows, inputs) and words, all blocks': uint32 that are float32; out (rows, outputs). A task is a block."""
    rows, step = x.shape
    x = x.reshape(-1)
    sums, totals = zeros(rows, OUTS), zeros(rows, OUTS)
    for task in range(start, stop):
        first = task * step * OUTS
        for begin in range(0, step, CHAIN):
            end = min(begin + CHAIN, step)
            add_few(x, step, words, first, begin, end, words, 0, 0, 0, sums)
            end_chain(totals, sums)
        store_block(out, task, totals)


@kernel(1)
def few_pairs_times(start: Any, stop: Any, x: Any, words: Any, out: Any) -> None:
    """The same with words that are pairs of bfloat16."""
    rows, step = x.shape
    x = x.reshape(-1)
    sums, totals = zeros(rows, OUTS), zeros(rows, OUTS)
    for task in range(start, stop):
        first = task * step * OUTS
        for begin in range(0, step, CHAIN // 2):
            end = min(begin + CHAIN // 2, step)
            add_few_pairs(x, step, words, first, begin, end, words, 0, 0, 0, sums)
            end_chain(totals, sums)
        store_block(out, task, totals)


@kernel(8)
def in_order(start: Any, stop: Any, x: Any, inputs: Any, words: Any, ordered: Any) -> None:
    """ordered (pieces, rows, NEAR) uint32 = x as float32, in the order in which few rows read so many words of so many
    inputs; zeros where x has none."""
    chain, near = CHAIN // inputs, NEAR // inputs
    for t in range(start, stop):
        for begin in range(0, words, chain):
            count = min(chain, words - begin)
            part = count // STREAMS
            for place in range(0, count, near):
                number = (begin + place) // near
                if place + near <= part * STREAMS and (begin + count) * inputs <= x.shape[1]:
                    for k in range(near // STREAMS):
                        word = begin + place // STREAMS + k
                        for stream in range(STREAMS):
                            at, to = word + stream * part, k * STREAMS + stream
                            if inputs == 1:
                                ordered[u(number), u(t), u(to)] = as_bits(read(x, t, at))
                            else:
                                ordered[u(number), u(t), u(2 * to)] = as_bits(read(x, t, 2 * at))
                                ordered[u(number), u(t), u(2 * to + 1)] = as_bits(read(x, t, 2 * at + 1))
                    continue
                for k in range(min(near, count - place)):
                    word = begin + word_at(place + k, part)
                    for j in range(inputs):
                        i = word * inputs + j
                        bits = as_bits(read(x, t, i)) if i < x.shape[1] else np.uint32(0)
                        ordered[u(number), u(t), u(k * inputs + j)] = bits


@piece
def load_words(tile, words, chain, part, place, count, inputs):  # type: ignore[no-untyped-def]
    """tile: so many words of a chain from a place in that order on, as float32; chain: where its words begin."""
    one_copy()
    for k in range(count):
        first = chain + word_at(place + k, part) * OUTS
        if inputs == 1:
            for j in range(OUTS):
                tile[u(k * OUTS + j)] = words[u(first + j)]
        else:
            for j in range(OUTS):
                pair = words[u(first + j)]
                tile[u(2 * k * OUTS + j)] = pair << np.uint32(16)
                tile[u((2 * k + 1) * OUTS + j)] = pair & np.uint32(0xFFFF0000)


@kernel(1)
def many_times(start: Any, stop: Any, x: Any, inputs: Any, step: Any, words: Any, out: Any) -> None:
    """The same for any number of rows of `in_order`; step: words of a block's output."""
    rows = out.shape[0]
    sums, totals, tile = zeros(rows, OUTS), zeros(rows, OUTS), np.empty(NEAR * OUTS, np.uint32)
    near, chain = NEAR // inputs, CHAIN // inputs
    for task in range(start, stop):
        for begin in range(0, step, chain):
            width = min(chain, step - begin)
            part, first = width // STREAMS, (task * step + begin) * OUTS
            for place in range(0, width, near):
                count = min(near, width - place)
                load_words(tile, words, first, part, place, count, inputs)
                number = (begin + place) // near
                # the next piece's words of one part, and how far those of the next part are
                ahead, apart = first + (place + near) // STREAMS * OUTS, part * OUTS
                of_piece = x[number].reshape(-1)
                add_many(of_piece, NEAR, tile, 0, 0, count * inputs, words, ahead, apart, number, sums)
            end_chain(totals, sums)
        store_block(out, task, totals)
