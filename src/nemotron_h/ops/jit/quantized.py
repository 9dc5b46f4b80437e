"""Rows in 8-bit integers times a matrix in 8- or 4-bit ones, and the rounding of rows. Definition: `ops/quantized.py`.

Many rows are multiplied by a piece of a block that stays in the nearest cache, at the rate of the instruction
(`quads.py`), and meanwhile memory is asked for the next piece. Few take as long as the matrix needs to arrive, and read
a block at several places at once. Sums of integers are exact, so all ways have the same bits. Few rows multiply the
codes of a 4-bit matrix as they are; for more, a piece of it is expanded in cache, once for all of them.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit import quads
from nemotron_h.ops.jit.blocks import LINE, OUTS, STREAMS
from nemotron_h.ops.jit.compiler import numba, one_copy, piece
from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.nibbles import DEEP, GROUP
from nemotron_h.ops.jit.nibbles import STREAMS as GROUPS
from nemotron_h.ops.jit.scalars import f, read, u, write

LEAST = f(2.0**-100)  # a row whose largest number is under this is nothing
NEAR = 64  # words of a block that all rows are multiplied by before the next ones
FEW = 12  # rows that wait for memory
SMALL = 4  # rows that multiply the codes of a 4-bit matrix
HEIGHT = 6  # rows whose sums stay in registers together
WIDTH = 4 * quads.LANES if quads.WIDE else 2 * quads.LANES  # outputs of them, as far as there are registers

if numba is not None:
    from nemotron_h.ops.jit.blocks import rows_sums
    from nemotron_h.ops.jit.nibbles import expand_group, group_sums
    from nemotron_h.ops.jit.scalars import as_bits, as_float

    add_many = rows_sums(quads.SUMS, WIDTH, quads.add_quads, HEIGHT)
    add_few = rows_sums(quads.SUMS, WIDTH, quads.add_quads, streams=STREAMS)
    one_of_codes, two_of_codes, four_of_codes = (group_sums(rows, 1) for rows in (1, 2, 4))
    one_of_groups, two_of_groups, four_of_groups = (group_sums(rows, GROUPS) for rows in (1, 2, 4))


@kernel(8)
def round_rows(start: Any, stop: Any, x: Any, levels: Any, codes: Any, scale: Any, eights: Any) -> None:
    """codes (rows, planes, padded inputs) = x / scale, rounded; scale (rows,): the largest is `levels`.

    One plane: 8-bit, 128 being nothing. Two: 16-bit, 32,768 being nothing, the high halves before the low ones. eights
    (rows * planes, groups or none): -8 times the sum of each GROUP of codes.
    """
    inputs = x.shape[1]
    planes = codes.shape[1]
    row = np.empty(inputs, np.float32)
    for t in range(start, stop):
        most = np.uint32(0)  # as bits, in whose order numbers come before infinity, and that before what is no number
        for j in range(inputs):
            row[u(j)] = read(x, t, j)
            most = max(most, as_bits(row[u(j)]) & np.uint32(0x7FFFFFFF))
        top = as_float(most)
        nothing = top < LEAST
        scale[t] = f(0) if nothing else top / levels
        factor = f(0) if nothing else levels / top
        if planes == 1:
            for j in range(inputs):
                codes[t, u(0), u(j)] = np.uint8(np.int32(np.rint(row[u(j)] * factor)) + np.int32(128))
        else:
            for j in range(inputs):
                code = np.uint32(np.int32(np.rint(row[u(j)] * factor)) + np.int32(32768))
                codes[t, u(0), u(j)] = np.uint8(code >> np.uint32(8))
                codes[t, u(1), u(j)] = np.uint8(code)
        for plane in range(planes):
            for j in range(inputs, codes.shape[2]):
                codes[t, plane, u(j)] = np.uint8(128)
            for group in range(eights.shape[1]):
                total = np.int32(0)
                for j in range(GROUP):
                    total += np.int32(codes[t, plane, u(group * GROUP + j)])
                eights[t * planes + plane, group] = np.int32(-8) * total


@piece
def add_groups(x, step, eights, words, scales, task, sums):  # type: ignore[no-untyped-def]
    """sums (rows, OUTS) int32 += x times a block of a 4-bit matrix, for few rows."""
    one_copy()
    rows, count = sums.shape[0], step // (2 * DEEP)
    part, first = count // GROUPS, task * count
    row = 0
    while row < rows:
        left = rows - row
        height = 4 if left >= 4 else min(left, 2)
        for g in range(part):
            if height == 4:
                four_of_groups(x, step, eights, words, scales, g, first + g, part, sums, row)
            elif height == 2:
                two_of_groups(x, step, eights, words, scales, g, first + g, part, sums, row)
            else:
                one_of_groups(x, step, eights, words, scales, g, first + g, part, sums, row)
        for g in range(part * GROUPS, count):
            if height == 4:
                four_of_codes(x, step, eights, words, scales, g, first + g, 0, sums, row)
            elif height == 2:
                two_of_codes(x, step, eights, words, scales, g, first + g, 0, sums, row)
            else:
                one_of_codes(x, step, eights, words, scales, g, first + g, 0, sums, row)
        row += height


@kernel(1)
def rows_times(
    start: Any,
    stop: Any,
    x: Any,
    x_scale: Any,
    eights: Any,
    words: Any,
    groups: Any,
    totals: Any,
    scale: Any,
    out: Any,
) -> None:
    """out (rows, outputs) = x_scale scale (x . integers).

    x (rows * planes, quads), x_scale, eights: of `round_rows`; words: all blocks'; groups (blocks * groups, OUTS / 2)
    uint8: pairs of a 4-bit matrix's scales, none of an 8-bit one; totals: each output's sum of integers. A task is one
    block of outputs.
    """
    lines, step = x.shape
    rows = out.shape[0]
    x = x.reshape(-1)
    sums = np.empty((lines, OUTS), np.int32)
    tile = np.empty(NEAR * OUTS, np.uint32)
    for task in range(start, stop):
        for i in range(lines):
            for j in range(OUTS):
                sums[u(i), u(j)] = totals[u(task * OUTS + j)] * np.int32(-128)
        if len(groups) == 0 and lines <= FEW:
            add_few(x, step, words, task * step * OUTS, 0, step, words, 0, 0, 0, sums)
        elif len(groups) > 0 and lines <= SMALL:
            add_groups(x, step, eights, words, groups, task, sums)
        else:
            for first in range(0, step, NEAR):
                count = min(NEAR, step - first)
                at = task * step + first
                if len(groups) == 0:
                    ahead, apart, begin = (at + count) * OUTS, count * LINE, task * step * OUTS
                    add_many(x, step, words, begin, first, first + count, words, ahead, apart, 0, sums)
                else:
                    for g in range(0, count // (2 * DEEP)):
                        group = at // (2 * DEEP) + g
                        expand_group(words, group * DEEP * OUTS, groups, group, tile, g * 2 * DEEP * OUTS)
                    ahead, apart, begin = (at + count) // 2 * OUTS, count * LINE, -first * OUTS
                    add_many(x, step, tile, begin, first, first + count, words, ahead, apart, 0, sums)
        for i in range(rows):
            for j in range(min(OUTS, out.shape[1] - task * OUTS)):
                if lines == rows:
                    total = f(sums[u(i), u(j)])
                else:
                    high = np.int64(sums[u(2 * i), u(j)]) * 256
                    total = f(high + np.int64(sums[u(2 * i + 1), u(j)]) + np.int64(totals[u(task * OUTS + j)]) * 128)
                write(out, i, task * OUTS + j, total * x_scale[u(i)] * scale[u(task * OUTS + j)])
