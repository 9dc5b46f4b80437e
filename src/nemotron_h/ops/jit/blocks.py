"""Rows of words times a block of words, summed in registers: the loop inside the kernels that read a matrix.

A word holds what one lane of an instruction multiplies: a float32, a pair of bfloat16 (`pairs.py`), or four 8-bit
integers (`quads.py`). A block is OUTS outputs of a matrix; in it, word k of every output lies side by side, then word
k + 1. Many rows read it in that order, and memory is asked meanwhile for what comes next. Few rows wait for memory:
they read a block at STREAMS places side by side, which memory serves faster than one.
"""

from collections.abc import Callable
from typing import Any

from nemotron_h.ops.jit.compiler import numba, one_copy, piece

OUTS = 64  # outputs of a block
LINE = 16  # words of a line of the cache
STREAMS = 8
SOON = 4  # words of each stream ahead, for which memory is asked: it follows streams by itself, but too late
SMALL = 4  # rows, of those that are few, whose sums stay in registers together

if numba is not None:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    from nemotron_h.ops.jit.scalars import ask_memory

    # of (builder, sums, a word of a row in every lane, words): the sums with the products added
    Add = Callable[[Any, Any, Any, Any], Any]

    def block_sums(rows: int, columns: int, of_sums: Any, add: Add, streams: int = 1) -> Any:
        """For numba: sums[row : row + rows, column : column + columns] goes on over the words from begin to before end.

        of_sums: LLVM's vector of sums, whose count divides columns. x: words, `step` from row to row; weights: words,
        the block's own from `first` on; sums (rows, OUTS), of the vector's elements.
        streams 1: words in order, and memory is asked for a line for each, from the word `ahead` of `asked` on. More:
        the words are cut into so many equal parts, the second word of each comes after the first ones, and what is
        left over comes last; memory is asked for what comes in each part, and `asked` and `ahead` are nothing.
        """
        lanes = of_sums.count
        words = ir.VectorType(ir.IntType(32), lanes)

        @intrinsic  # type: ignore[untyped-decorator]
        def go_on(typing, x, step, weights, first, begin, end, asked, ahead, sums, row, column):  # type: ignore[no-untyped-def]
            def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
                def address(argument, *place):  # type: ignore[no-untyped-def]
                    kind = signature.args[argument]
                    array = context.make_array(kind)(context, builder, args[argument])
                    return cgutils.get_item_pointer(context, builder, kind, array, list(place), wraparound=False)

                def load(where, kind):  # type: ignore[no-untyped-def]
                    loaded = builder.load(builder.bitcast(where, kind.as_pointer()))
                    loaded.align = 4  # that of a word
                    return loaded

                _, step, _, first, begin, end, _, ahead, _, row, column = args
                word, number = begin.type, ir.IntType(32)
                nothing, everywhere = ir.Constant(words, ir.Undefined), ir.Constant(words, None)
                vectors = [builder.add(column, word(place)) for place in range(0, columns, lanes)]
                lines = [builder.add(row, word(r)) for r in range(rows)]
                places = [[address(8, line, vector) for vector in vectors] for line in lines]
                totals = [[cgutils.alloca_once_value(builder, load(p, of_sums)) for p in line] for line in places]

                def of_block(k):  # type: ignore[no-untyped-def]
                    return builder.add(first, builder.mul(k, word(OUTS)))

                def add_word(k):  # type: ignore[no-untyped-def]
                    at = of_block(k)
                    some = [load(address(2, builder.add(at, vector)), words) for vector in vectors]
                    for line, own in zip(lines, totals, strict=True):
                        value = builder.load(address(0, builder.add(builder.mul(step, line), k)))
                        value = builder.insert_element(nothing, value, number(0))
                        value = builder.shuffle_vector(value, nothing, everywhere)
                        for total, weight in zip(own, some, strict=True):
                            builder.store(add(builder, builder.load(total), value, weight), total)

                part = builder.udiv(builder.sub(end, begin), word(streams))
                of_part = builder.add(begin, part)
                with cgutils.for_range_slice(builder, begin, of_part, word(1)) as (k, _):
                    if streams == 1:
                        later = builder.add(ahead, builder.mul(builder.sub(k, begin), word(LINE)))
                        ask_memory(builder, address(6, later))
                    for stream in range(streams):
                        mine = builder.add(k, builder.mul(part, word(stream)))
                        if streams > 1:
                            soon = of_block(builder.add(mine, word(SOON)))
                            for line in range(0, OUTS, LINE):
                                ask_memory(builder, address(2, builder.add(soon, word(line))))
                        add_word(mine)
                if streams > 1:
                    left = builder.add(begin, builder.mul(part, word(streams)))
                    with cgutils.for_range_slice(builder, left, end, word(1)) as (k, _):
                        add_word(k)
                for line, own in zip(places, totals, strict=True):
                    for place, total in zip(line, own, strict=True):
                        builder.store(builder.load(total), builder.bitcast(place, of_sums.as_pointer())).align = 4
                return context.get_dummy_value()

            return types.void(x, step, weights, first, begin, end, asked, ahead, sums, row, column), generate

        return go_on

    def rows_sums(of_sums: Any, width: int, add: Add, height: int = SMALL, streams: int = 1) -> Any:
        """For numba: the same for all rows of sums (rows, OUTS), `height` of them and `width` outputs at a time.

        Groups of rows ask memory in turn for STREAMS runs of lines, a line for each word, `apart` words after each
        other from the word `ahead` of `asked` on; turn: which run is the first. OUTS / LINE groups ask for as many
        words as they multiply: where rows are too few for so many high groups, they are cut into groups of SMALL.
        """
        one = block_sums(1, OUTS, of_sums, add, streams)
        two, three, four = (block_sums(rows, width, of_sums, add, streams) for rows in (2, 3, 4))
        most = block_sums(height, width, of_sums, add, streams) if height > SMALL else four

        def go_on(x, step, weights, first, begin, end, asked, ahead, apart, turn, sums):  # type: ignore[no-untyped-def]
            one_copy()
            rows, last = sums.shape[0], len(asked) - (end - begin) * LINE
            high = height if rows > (OUTS // LINE - 1) * height else SMALL
            row = 0
            while row < rows:
                left = rows - row
                taken = high if left >= high else min(left, SMALL)
                soon = min(ahead + turn % STREAMS * apart, last)
                if taken == 1:
                    one(x, step, weights, first, begin, end, asked, soon, sums, row, 0)
                else:
                    for column in range(0, OUTS, width):
                        if taken == 2:
                            two(x, step, weights, first, begin, end, asked, soon, sums, row, column)
                        elif taken == 3:
                            three(x, step, weights, first, begin, end, asked, soon, sums, row, column)
                        elif taken == SMALL:
                            four(x, step, weights, first, begin, end, asked, soon, sums, row, column)
                        else:
                            most(x, step, weights, first, begin, end, asked, soon, sums, row, column)
                row, turn = row + taken, turn + 1

        # numba names what it makes of a function by this, and what is kept on disk meets what other processes made
        go_on.__qualname__ = f"go_on_{add.__name__}_{width}_{height}_{streams}"
        return piece(go_on)
