"""Eight 4-bit codes in a 32-bit word: their products with a row, and the 8-bit integers they stand for.

    integer = (code - 8) s        s = +-(4 + m) 2^e, one for GROUP inputs of an output: a sign, e of one bit, m of two

Byte b of a word holds the code of input b in its low half and that of input 4 + b in its high half: two quads
(`quads.py`). A byte of scales holds those of the outputs j and j + OUTS / 2 likewise.
"""

from collections.abc import Iterator
from typing import Any

from nemotron_h.ops.jit import quads
from nemotron_h.ops.jit.blocks import LINE, OUTS
from nemotron_h.ops.jit.compiler import FEATURES, numba

GROUP = 16  # inputs of an output that share a scale
DEEP = GROUP // 8  # words of a group, two quads each
STREAMS = 4  # groups, a part of the inputs apart, that are multiplied side by side (`blocks.py`)
SOON = 8  # groups ahead in each, for which memory is asked
SCALES = (4, 5, 6, 7, 8, 10, 12, 14, -4, -5, -6, -7, -8, -10, -12, -14)  # by their four bits

if numba is not None:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    from nemotron_h.ops.jit.scalars import ask_memory

    LANES, WORDS = quads.LANES, quads.SUMS
    BYTE, NUMBER, PLACE = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    HALVES, BYTES = ir.VectorType(ir.IntType(16), 2 * LANES), ir.VectorType(BYTE, 4 * LANES)

    def everywhere(number: int) -> Any:
        return ir.Constant(WORDS, [number] * LANES)

    def load(builder: Any, where: Any, kind: Any) -> Any:
        loaded = builder.load(builder.bitcast(where, kind.as_pointer()))
        loaded.align = 1
        return loaded

    def scales_at(builder: Any, pairs: Any, column: int) -> Any:
        """The scales of LANES outputs from column on; pairs: the address of the group's bytes."""
        some = ir.VectorType(BYTE, LANES)
        both = load(builder, builder.gep(pairs, [PLACE(column % (OUTS // 2))]), some)
        if column < OUTS // 2:
            chosen = builder.and_(both, ir.Constant(some, [15] * LANES))
        else:
            chosen = builder.lshr(both, ir.Constant(some, [4] * LANES))
        if FEATURES.get("ssse3", False):
            table = ir.VectorType(BYTE, 16)
            lookup = ir.FunctionType(table, [table] * 2)
            find = cgutils.get_or_insert_function(builder.module, lookup, "llvm.x86.ssse3.pshuf.b.128")
            order = ir.Constant(ir.VectorType(NUMBER, 16), [k % LANES for k in range(16)])
            chosen = builder.shuffle_vector(chosen, ir.Constant(some, ir.Undefined), order)
            found = builder.call(find, [ir.Constant(table, [scale % 256 for scale in SCALES]), chosen])
            order = ir.Constant(ir.VectorType(NUMBER, LANES), list(range(LANES)))
            return builder.sext(builder.shuffle_vector(found, ir.Constant(table, ir.Undefined), order), WORDS)
        chosen = builder.zext(chosen, WORDS)
        size = builder.add(builder.and_(chosen, everywhere(3)), everywhere(4))
        size = builder.shl(size, builder.and_(builder.lshr(chosen, everywhere(2)), everywhere(1)))
        sign = builder.sub(everywhere(0), builder.lshr(chosen, everywhere(3)))
        return builder.sub(builder.xor(size, sign), sign)

    def codes_at(builder: Any, words: Any, column: int) -> Iterator[tuple[int, Any]]:
        """(quad of the group, its codes of LANES outputs from column on); words: the address of the group's first."""
        for k in range(DEEP):
            both = load(builder, builder.gep(words, [PLACE(k * OUTS + column)]), WORDS)
            for half, codes in enumerate((both, builder.lshr(both, everywhere(4)))):
                yield 2 * k + half, builder.and_(codes, everywhere(0x0F0F0F0F))

    def in_arrays(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def address(argument: int, *place: Any) -> Any:
            kind = signature.args[argument]
            array = context.make_array(kind)(context, builder, args[argument])
            return cgutils.get_item_pointer(context, builder, kind, array, list(place), wraparound=False)

        return address

    @intrinsic  # type: ignore[untyped-decorator]
    def expand_group(typing, words, at, scales, group, tile, to):  # type: ignore[no-untyped-def]
        """tile[to : to + 2 * DEEP * OUTS] = the group's integers in quads, of the scale's size |s|:

            s > 0: code |s| - 8 |s|        s < 0: (15 - code) |s| - 7 |s|

        Codes are multiplied two bytes at a time: no product passes 210, so nothing is carried."""

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            address = in_arrays(context, builder, signature, args)
            _, at, _, group, _, to = args
            start, pairs, into = address(0, at), address(2, group, PLACE(0)), address(4, to)
            for column in range(0, OUTS, LANES):
                scale = scales_at(builder, pairs, column)
                negative = builder.ashr(scale, everywhere(31))
                size = builder.sub(builder.xor(scale, negative), negative)
                sizes = builder.mul(size, everywhere(0x01010101))
                times = builder.bitcast(builder.and_(sizes, everywhere(0x00FF00FF)), HALVES)
                offset = builder.sub(builder.shl(sizes, everywhere(3)), builder.and_(sizes, negative))
                offset, flipped = builder.bitcast(offset, BYTES), builder.and_(negative, everywhere(0x0F0F0F0F))
                for quad, codes in codes_at(builder, start, column):
                    factors = builder.bitcast(builder.xor(codes, flipped), HALVES)
                    integers = builder.sub(builder.bitcast(builder.mul(factors, times), BYTES), offset)
                    place = builder.gep(into, [PLACE(quad * OUTS + column)])
                    builder.store(
                        builder.bitcast(integers, WORDS), builder.bitcast(place, WORDS.as_pointer())
                    ).align = 4
            return context.get_dummy_value()

        return types.void(words, at, scales, group, tile, to), generate

    def group_sums(rows: int, streams: int) -> Any:
        """For numba: sums[row : row + rows, :OUTS] += x times so many groups of a block, each `apart` groups after
        the one before.

        The first is the block's own number `own`, and number `group` of all. x: quads, `step` from row to row; eights
        (rows, groups) int32: -8 times the sum of a row's codes in a group.
        """

        @intrinsic  # type: ignore[untyped-decorator]
        def go_on(typing, x, step, eights, words, scales, own, group, apart, sums, row):  # type: ignore[no-untyped-def]
            def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
                address = in_arrays(context, builder, signature, args)
                _, step, _, _, _, own, group, apart, _, row = args
                lines = [builder.add(row, PLACE(r)) for r in range(rows)]
                places = []
                for stream in range(streams):
                    mine, of_all = (builder.add(g, builder.mul(apart, PLACE(stream))) for g in (own, group))
                    quad = builder.mul(mine, PLACE(2 * DEEP))
                    starts = [address(0, builder.add(builder.mul(step, line), quad)) for line in lines]
                    begins = [builder.load(address(2, line, mine)) for line in lines]
                    words = address(3, builder.mul(of_all, PLACE(DEEP * OUTS)))
                    places.append((words, address(4, of_all, PLACE(0)), starts, begins))
                    soon = builder.gep(words, [PLACE(SOON * DEEP * OUTS)])
                    for line in range(0, DEEP * OUTS, LINE):
                        ask_memory(builder, builder.gep(soon, [PLACE(line)]))
                nothing, same = ir.Constant(WORDS, ir.Undefined), ir.Constant(WORDS, None)

                def spread(number):  # type: ignore[no-untyped-def]
                    return builder.shuffle_vector(builder.insert_element(nothing, number, NUMBER(0)), nothing, same)

                for column in range(0, OUTS, LANES):
                    wheres = [builder.bitcast(address(8, r, PLACE(column)), WORDS.as_pointer()) for r in lines]
                    totals = [load(builder, where, WORDS) for where in wheres]
                    for start, pairs, starts, begins in places:
                        parts = [spread(begin) for begin in begins]
                        for of_group, codes in codes_at(builder, start, column):
                            for r, begin in enumerate(starts):
                                value = spread(builder.load(builder.gep(begin, [PLACE(of_group)])))
                                parts[r] = quads.add_quads(builder, parts[r], value, codes)
                        scale = scales_at(builder, pairs, column)
                        times = [builder.mul(part, scale) for part in parts]
                        totals = [builder.add(total, product) for total, product in zip(totals, times, strict=True)]
                    for where, total in zip(wheres, totals, strict=True):
                        builder.store(total, where).align = 4
                return context.get_dummy_value()

            return types.void(x, step, eights, words, scales, own, group, apart, sums, row), generate

        return go_on
