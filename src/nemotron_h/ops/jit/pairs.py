"""Pairs of bfloat16 in 32-bit words, and the instruction that adds the products of two pairs to a float32 sum.

    sum + a.low b.low + a.high b.high

It is AVX-512's, 16 sums at a time, at twice the rate of float32's multiply-add; what it rounds, and how, is its own.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.compiler import FEATURES, numba, one_copy, piece
from nemotron_h.ops.jit.scalars import u

ADDS_PAIRS = FEATURES.get("avx512bf16", False)  # has this CPU the instruction?
if numba is not None:
    from llvmlite import ir
    from numba.core import cgutils

    class BFloat(ir.Type):  # type: ignore[misc]
        """llvmlite has no name for it."""

        def _to_string(self) -> str:
            return "bfloat"

    BFLOAT = BFloat()

    def add_pairs(builder: Any, sums: Any, a: Any, b: Any) -> Any:
        """LLVM's value of sums + the products of a and b: vectors of 16 or 4 float32, and of as many words."""
        lanes = sums.type.count
        halves = ir.VectorType(BFLOAT, 2 * lanes)
        kind = ir.FunctionType(sums.type, [sums.type, halves, halves])
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, [sums, builder.bitcast(a, halves), builder.bitcast(b, halves)])


@piece
def load_pairs(tile, array, first, column, pairs, columns):  # type: ignore[no-untyped-def]
    """Fill the first rows of a tile of words, each with two rows of bfloat16 bits of an array from a place on."""
    one_copy()
    for k in range(pairs):
        low, high = u(first + 2 * k), u(first + 2 * k + 1)
        for j in range(columns):
            tile[k, j] = np.uint32(array[low, u(column + j)]) | np.uint32(array[high, u(column + j)]) << np.uint32(16)
