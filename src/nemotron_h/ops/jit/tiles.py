"""Tiles, small float32 matrices: their product in vector registers, and what else is done with them. They lie in cache,
but for the state that a decode step's only row meets.

    out[i, q] += factors[i, 0] rows[0, q] + factors[i, 1] rows[1, q] + ...

HEIGHT rows of `out`, WIDEST columns wide, stay in registers while k runs; a row alone, WIDEST_ROW columns of it. Every
element is the same chain of fused multiply-adds in the order of k, wherever it stands: its bits depend on its own
factors and its own column alone. Where factors and rows are words, a k is a pair of bfloat16 (`pairs.py`).
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.compiler import FEATURES, numba, one_copy, piece
from nemotron_h.ops.jit.scalars import LANES, f, read, write

HEIGHT = 4
WIDEST = 4 * LANES if FEATURES.get("avx512f", False) else LANES  # as far as there are registers
WIDEST_ROW = 4 * LANES  # of one row alone
SOON = 16  # rows that memory is asked for ahead, where they are multiplied by one row alone

if numba is not None:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    from nemotron_h.ops.jit.pairs import add_pairs
    from nemotron_h.ops.jit.scalars import ask_memory

    FLOAT, HALVES, WORD = ir.FloatType(), ir.IntType(32), ir.IntType(64)

    def tile(height: int, lanes: int) -> Any:
        """For numba: out[i : i + height, q : q + lanes] += factors[i :, column : column + count] rows[first :, q :]."""

        @intrinsic  # type: ignore[untyped-decorator]
        def add(typing, out, i, q, factors, column, rows, first, count):  # type: ignore[no-untyped-def]
            def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
                kinds = signature.args

                def place(argument, row, at):  # type: ignore[no-untyped-def]
                    """The address of an element, and the bytes from row to row and from column to column."""
                    kind = kinds[argument]
                    array = context.make_array(kind)(context, builder, args[argument])
                    address = cgutils.get_item_pointer(context, builder, kind, array, [row, at], wraparound=False)
                    return address, *cgutils.unpack_tuple(builder, array.strides)

                _, i, q, _, column, _, first, count = args
                out, out_step, _ = place(0, i, q)
                factors, factors_step, factor_step = place(3, i, column)
                rows, rows_step, _ = place(5, first, q)
                function = _tile_function(builder.module, height, lanes, paired=kinds[3].dtype == types.uint32)
                builder.call(function, [out, out_step, factors, factors_step, factor_step, rows, rows_step, count])
                return context.get_dummy_value()

            return types.void(out, i, q, factors, column, rows, first, count), generate

        return add

    def _tile_function(module: Any, height: int, lanes: int, *, paired: bool) -> Any:
        """The tile's loop over k as one function of the module: addresses, steps in bytes, the count."""
        kind = HALVES if paired else FLOAT  # of factors and rows
        pointers = [FLOAT.as_pointer(), WORD, kind.as_pointer(), WORD, WORD, kind.as_pointer(), WORD, WORD]
        name = f"nemotron_h_product_{'pairs_' * paired}{height}_{lanes}"
        if name in module.globals:
            return module.globals[name]
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), pointers), name)
        function.linkage = "linkonce_odr"
        for attribute in ("noinline", "optsize"):  # one copy, not unrolled: it takes seconds to compile many
            function.attributes.add(attribute)
        out, out_step, factors, factors_step, factor_step, rows, rows_step, count = function.args
        builder = ir.IRBuilder(function.append_basic_block())
        width = min(lanes, LANES)  # of one vector
        of_kind = ir.VectorType(kind, width)
        nothing, zeros = ir.Constant(of_kind, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), width), None)

        def move(address, step, times):  # type: ignore[no-untyped-def]
            return cgutils.pointer_add(builder, address, builder.mul(step, times), address.type)

        def places(address):  # type: ignore[no-untyped-def]
            """Of the vectors side by side from an address on."""
            vector = ir.VectorType(address.type.pointee, width).as_pointer()
            starts = [builder.gep(address, [WORD(first)]) for first in range(0, lanes, width)]
            return [builder.bitcast(start, vector) for start in starts]

        def loaded(place):  # type: ignore[no-untyped-def]
            vector = builder.load(place)
            vector.align = 4  # that of a float32: rows begin anywhere
            return vector

        def added(factor, row, total):  # type: ignore[no-untyped-def]
            if not paired:
                function = ir.FunctionType(of_kind, [of_kind] * 3)
                fused = cgutils.get_or_insert_function(module, function, f"llvm.fma.v{width}f32")
                return builder.call(fused, [factor, row, total])
            if width > 1:
                return add_pairs(builder, total, factor, row)
            four = ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4)  # there is none of one lane
            factor, row, total = (builder.shuffle_vector(t, t, four) for t in (factor, row, total))
            return builder.shuffle_vector(add_pairs(builder, total, factor, row), total, zeros)

        outs = [places(move(out, out_step, WORD(r))) for r in range(height)]
        sums = [[cgutils.alloca_once_value(builder, loaded(place)) for place in line] for line in outs]
        with cgutils.for_range(builder, count) as loop:
            row = move(rows, rows_step, loop.index)
            if height == 1 and lanes > 1:  # a row alone, perhaps a step's: memory is asked for what comes next
                for place in places(move(row, rows_step, WORD(SOON))):
                    ask_memory(builder, place)
            vectors = [loaded(place) for place in places(row)]
            ahead = move(factors, factor_step, loop.index)
            for r, line in enumerate(sums):
                factor = builder.insert_element(nothing, builder.load(move(ahead, factors_step, WORD(r))), WORD(0))
                everywhere = builder.shuffle_vector(factor, nothing, zeros)
                for vector, total in zip(vectors, line, strict=True):
                    builder.store(added(everywhere, vector, builder.load(total)), total)
        for places_of_line, line in zip(outs, sums, strict=True):
            for place, total in zip(places_of_line, line, strict=True):
                builder.store(builder.load(total), place).align = 4
        builder.ret_void()
        return function

    high_widest, high_wide, high_single = tile(HEIGHT, WIDEST), tile(HEIGHT, LANES), tile(HEIGHT, 1)
    low_widest, low_wide, low_single = tile(1, WIDEST_ROW), tile(1, LANES), tile(1, 1)


@piece
def add_product(out, begin, end, width, factors, column, rows, first, count):  # type: ignore[no-untyped-def]
    """out[i, :width] += sum_k factors[i, column + k] rows[first + k, :width], k = 0..count-1, begin <= i < end.

    All two-dimensional float32, or factors and rows words of pairs; a row of `out` and of `rows` is contiguous,
    `factors` may be turned.
    """
    one_copy()
    i, widest, whole = begin, width // WIDEST * WIDEST, width // LANES * LANES
    while i + HEIGHT <= end:
        for q in range(0, widest, WIDEST):
            high_widest(out, i, q, factors, column, rows, first, count)
        for q in range(widest, whole, LANES):
            high_wide(out, i, q, factors, column, rows, first, count)
        for q in range(whole, width):
            high_single(out, i, q, factors, column, rows, first, count)
        i += HEIGHT
    widest = width // WIDEST_ROW * WIDEST_ROW
    while i < end:
        for q in range(0, widest, WIDEST_ROW):
            low_widest(out, i, q, factors, column, rows, first, count)
        for q in range(widest, whole, LANES):
            low_wide(out, i, q, factors, column, rows, first, count)
        for q in range(whole, width):
            low_single(out, i, q, factors, column, rows, first, count)
        i += 1


@piece
def add_causal_product(out, begin, end, factors, rows, first):  # type: ignore[no-untyped-def]
    """out[i] += sum_{k <= first + i} factors[i, k] rows[k], begin <= i < end: what lies later is not even read."""
    one_copy()
    i, width = begin, out.shape[1]
    while i < end:
        last = min(i + HEIGHT, end)
        add_product(out, i, last, width, factors, 0, rows, 0, first + i + 1)
        for j in range(i + 1, last):
            add_product(out, j, j + 1, width, factors, first + i + 1, rows, first + i + 1, j - i)
        i = last


@piece
def load_rows(tile, array, first, column, rows, columns):  # type: ignore[no-untyped-def]
    """Fill the first rows and columns of a tile with those of an array from a place on."""
    one_copy()
    for i in range(rows):
        for j in range(columns):
            tile[i, j] = read(array, first + i, column + j)


@piece
def load(tile, array, first, column, count):  # type: ignore[no-untyped-def]
    """Fill a tile with the rows of an array from first on, their columns from column on; zeros after count rows."""
    one_copy()
    load_rows(tile, array, first, column, count, tile.shape[1])
    for i in range(count, tile.shape[0]):
        for j in range(tile.shape[1]):
            tile[i, j] = f(0)


@piece
def load_turned(tile, array, first, column):  # type: ignore[no-untyped-def]
    """The same with rows becoming columns, all of them there."""
    one_copy()
    for j in range(tile.shape[1]):
        for i in range(tile.shape[0]):
            tile[i, j] = read(array, first + j, column + i)


@piece
def store_rows(array, first, column, tile, count):  # type: ignore[no-untyped-def]
    """The inverse of `load`, for the first rows of a tile."""
    one_copy()
    for i in range(count):
        for j in range(tile.shape[1]):
            write(array, first + i, column + j, tile[i, j])


@piece
def store(array, first, column, tile):  # type: ignore[no-untyped-def]
    """The same for all of them."""
    one_copy()
    store_rows(array, first, column, tile, tile.shape[0])


@piece
def scale_rows(tile, factors):  # type: ignore[no-untyped-def]
    """tile[i, j] *= factors[i]"""
    one_copy()
    for i in range(tile.shape[0]):
        factor = factors[i]
        for j in range(tile.shape[1]):
            tile[i, j] *= factor


@piece
def scale_columns(tile, factors):  # type: ignore[no-untyped-def]
    """tile[i, j] *= factors[j]"""
    one_copy()
    for i in range(tile.shape[0]):
        for j in range(tile.shape[1]):
            tile[i, j] *= factors[j]


@piece
def multiply(tile, other):  # type: ignore[no-untyped-def]
    """tile[i, j] *= other[i, j]"""
    one_copy()
    for i in range(tile.shape[0]):
        for j in range(tile.shape[1]):
            tile[i, j] *= other[i, j]


@piece
def add_scaled_columns(out, tile, factors):  # type: ignore[no-untyped-def]
    """out[i, j] += tile[i, j] factors[j]"""
    one_copy()
    for i in range(tile.shape[0]):
        for j in range(tile.shape[1]):
            out[i, j] += tile[i, j] * factors[j]


@piece
def add_dots(out, a, b):  # type: ignore[no-untyped-def]
    """out[j] += sum_i a[i, j] b[i, j]"""
    one_copy()
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            out[j] += a[i, j] * b[i, j]


@piece
def add_column_sums(out, tile):  # type: ignore[no-untyped-def]
    """out[j] += sum_i tile[i, j]"""
    one_copy()
    for i in range(tile.shape[0]):
        for j in range(tile.shape[1]):
            out[j] += tile[i, j]


@piece
def clear(tile):  # type: ignore[no-untyped-def]
    """tile[i, j] = 0"""
    one_copy()
    for i in range(tile.shape[0]):
        for j in range(tile.shape[1]):
            tile[i, j] = f(0)


@piece
def zeros(rows, columns):  # type: ignore[no-untyped-def]
    return np.zeros((rows, columns), np.float32)
