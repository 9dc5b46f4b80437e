"""The integers nearest to a matrix's rows, their scales searched. Definition: `ops/rounding.py`.

A loop tries LANES steps at once, one in each lane of a vector: of a row in 8 bits its own candidates, of a group in 4
bits the SCALES.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.compiler import numba, one_copy, piece
from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.nibbles import GROUP, SCALES
from nemotron_h.ops.jit.quantized import LEAST
from nemotron_h.ops.jit.scalars import LANES, f, u

ALL = np.array(SCALES, np.float32)


if numba is not None:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    VECTOR = ir.VectorType(ir.FloatType(), LANES)

    @intrinsic  # type: ignore[untyped-decorator]
    def errors(typing, row, worth, first, last, steps, low, high, found):  # type: ignore[no-untyped-def]
        """found[q] = sum over first <= j < last of worth[j] (row[j] - step q's nearest multiple)^2, the multiples from
        low to high."""

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            def address(argument, place):  # type: ignore[no-untyped-def]
                kind = signature.args[argument]
                array = context.make_array(kind)(context, builder, args[argument])
                return cgutils.get_item_pointer(context, builder, kind, array, [place], wraparound=False)

            def of_lanes(name, *values):  # type: ignore[no-untyped-def]
                kind = ir.FunctionType(VECTOR, [VECTOR] * len(values))
                function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32")
                return builder.call(function, values)

            def spread(number):  # type: ignore[no-untyped-def]
                some = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), number, ir.IntType(32)(0))
                same = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
                return builder.shuffle_vector(some, ir.Constant(VECTOR, ir.Undefined), same)

            _, _, first, last, _, low, high, _ = args
            step = builder.load(builder.bitcast(address(4, first.type(0)), VECTOR.as_pointer()))
            step.align = 4
            inverse = builder.fdiv(ir.Constant(VECTOR, [1.0] * LANES), step)
            lowest, highest = spread(low), spread(high)
            total = cgutils.alloca_once_value(builder, ir.Constant(VECTOR, [0.0] * LANES))
            with cgutils.for_range_slice(builder, first, last, first.type(1)) as (place, _):
                number, price = spread(builder.load(address(0, place))), spread(builder.load(address(1, place)))
                code = of_lanes("rint", builder.fmul(number, inverse))
                code = of_lanes("minnum", of_lanes("maxnum", code, lowest), highest)
                off = builder.fsub(number, builder.fmul(code, step))
                cost = builder.fmul(builder.fmul(price, off), off)
                builder.store(builder.fadd(builder.load(total), cost), total)
            builder.store(
                builder.load(total), builder.bitcast(address(7, first.type(0)), VECTOR.as_pointer())
            ).align = 4
            return context.get_dummy_value()

        return types.void(row, worth, first, last, steps, low, high, found), generate


@piece
def largest(row):  # type: ignore[no-untyped-def]
    one_copy()
    top = f(0)
    for j in range(len(row)):
        top = max(top, abs(row[u(j)]))
    return top


@piece
def least(found):  # type: ignore[no-untyped-def]
    place = 0
    for q in range(1, LANES):
        if found[q] < found[place]:
            place = q
    return place


@kernel(8)
def nearest_8(
    start: Any, stop: Any, weight: Any, worth: Any, factors: Any, levels: Any, integers: Any, scale: Any
) -> None:
    """weight (outs, ins) float32; worth (ins,) of an error at each input; factors (LANES,) of the step that reaches the
    largest weight. integers int8 (outs, ins), scale (outs,)."""
    ins = weight.shape[1]
    steps, found = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for o in range(start, stop):
        row = weight[o]
        top = largest(row)
        if top < LEAST:
            scale[o] = f(0)
            integers[o] = 0
            continue
        for q in range(LANES):
            steps[q] = top / levels * factors[q]
        errors(row, worth, 0, ins, steps, -levels, levels, found)
        step = steps[least(found)]
        scale[o] = step
        inverse = f(1) / step
        for j in range(ins):
            integers[o, u(j)] = np.int8(min(max(np.float32(np.rint(row[u(j)] * inverse)), -levels), levels))


@piece
def error_under(row, worth, scale):  # type: ignore[no-untyped-def]
    """The least error of a row under a scale."""
    one_copy()
    steps, found = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for q in range(LANES):
        steps[q] = scale * ALL[q]
    error = 0.0
    for first in range(0, len(row), GROUP):
        errors(row, worth, first, min(first + GROUP, len(row)), steps, f(-8), f(7), found)
        error += found[least(found)]
    return error


@piece
def nearest_groups(row, worth, scale, codes, groups):  # type: ignore[no-untyped-def]
    """Fill codes and groups of a row under a scale; returns the best scale for these integers."""
    one_copy()
    steps, found = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for q in range(LANES):
        steps[q] = scale * ALL[q]
    product, square = 0.0, 0.0
    for g in range(len(groups)):
        first, last = g * GROUP, min((g + 1) * GROUP, len(row))
        errors(row, worth, first, last, steps, f(-8), f(7), found)
        q = least(found)
        groups[g] = q
        inverse = f(1) / steps[q]
        for j in range(first, last):
            code = min(max(np.float32(np.rint(row[u(j)] * inverse)), f(-8)), f(7))
            codes[u(j)] = np.uint8(np.int32(code) + 8)
            integer = np.float64(code * ALL[q])
            product += worth[u(j)] * row[u(j)] * integer
            square += worth[u(j)] * integer * integer
    return f(product / square) if square > 0 else scale


@kernel(1)
def nearest_4(
    start: Any, stop: Any, weight: Any, worth: Any, factors: Any, codes: Any, groups: Any, scale: Any
) -> None:
    """As `nearest_8`: codes uint8 (outs, ins), groups uint8 (outs, groups), scale (outs,)."""
    for o in range(start, stop):
        row = weight[o]
        top = largest(row)
        if top < LEAST:
            scale[o] = f(0)
            codes[o] = 8
            groups[o] = 0
            continue
        full = top / f(7.5 * 14)
        best, chosen = np.inf, full
        for q in range(len(factors)):
            error = error_under(row, worth, full * factors[q])
            if error < best:
                best, chosen = error, full * factors[q]
        # twice the better of the two given the other: the scale, and the integers
        chosen = nearest_groups(row, worth, chosen, codes[o], groups[o])
        scale[o] = nearest_groups(row, worth, chosen, codes[o], groups[o])


@kernel(1)
def fed_back(
    start: Any, stop: Any, weight: Any, upper: Any, scale: Any, small: Any, integers: Any, groups: Any, left: Any
) -> None:
    """weight (outs, columns) float32, which changes: each column is rounded, and its error, over the diagonal of upper
    (columns, columns), is taken from the columns after it by its row of upper and kept in left (outs, columns).

    small: whether integers (outs, columns) int8 are codes under the scales of groups, chosen here, and not 8-bit ones.
    """
    columns = weight.shape[1]
    steps, found, worth = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(columns, np.float32)
    for j in range(columns):
        worth[j] = f(1) / (upper[j, j] * upper[j, j])
    low, high = (f(-8), f(7)) if small else (f(-127), f(127))
    for o in range(start, stop):
        row = weight[o]
        for q in range(LANES):
            steps[q] = scale[o] * ALL[q]
        step = scale[o]
        for j in range(columns):
            if small and j % GROUP == 0:
                errors(row, worth, j, min(j + GROUP, columns), steps, low, high, found)
                q = least(found)
                groups[o, j // GROUP] = q
                step = steps[q]
            code = min(max(np.float32(np.rint(row[u(j)] / step)), low), high) if step != f(0) else f(0)
            integers[o, u(j)] = np.int8(code)
            error = (row[u(j)] - code * step) / upper[j, j]
            left[o, u(j)] = error
            for k in range(j + 1, columns):
                row[u(k)] -= error * upper[u(j), u(k)]
