"""Four 8-bit integers in a 32-bit word, and their products with four others added to a 32-bit sum.

    sum + a0 b0 + a1 b1 + a2 b2 + a3 b3            a in 0..255, b in -128..127

One instruction where the CPU has it (AVX-512's or AVX's VNNI); else products of 16-bit halves in AVX2, or plain ones.
All are exact, so all have the same bits.
"""

from typing import Any

from nemotron_h.ops.jit.compiler import FEATURES, numba

ADDS_QUADS = FEATURES.get("avx512vnni", False) or FEATURES.get("avxvnni", False)  # has this CPU the instruction?
WIDE = FEATURES.get("avx512vnni", False) and FEATURES.get("avx512f", False)  # for 16 sums at a time, or for 8?
LANES = 16 if WIDE else 8  # sums of a vector

if numba is not None:
    from llvmlite import ir
    from numba.core import cgutils

    SUMS = ir.VectorType(ir.IntType(32), LANES)

    def add_quads(builder: Any, sums: Any, a: Any, b: Any) -> Any:
        """LLVM's value of sums + the products of a and b: vectors of LANES 32-bit numbers, and of as many words."""
        if ADDS_QUADS:
            kind = ir.FunctionType(SUMS, [SUMS] * 3)
            name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [sums, a, b])
        return _in_halves(builder, sums, a, b) if FEATURES.get("avx2", False) else _one_by_one(builder, sums, a, b)

    def _in_halves(builder: Any, sums: Any, a: Any, b: Any) -> Any:
        """The even and the odd numbers of a word widened to 16 bits, and two products added at a time."""
        halves = ir.VectorType(ir.IntType(16), 2 * LANES)
        kind = ir.FunctionType(SUMS, [halves] * 2)
        multiply = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
        eight, low = ir.Constant(halves, [8] * 2 * LANES), ir.Constant(halves, [255] * 2 * LANES)
        a, b = builder.bitcast(a, halves), builder.bitcast(b, halves)
        even = builder.call(multiply, [builder.and_(a, low), builder.ashr(builder.shl(b, eight), eight)])
        odd = builder.call(multiply, [builder.lshr(a, eight), builder.ashr(b, eight)])
        return builder.add(sums, builder.add(even, odd))

    def _one_by_one(builder: Any, sums: Any, a: Any, b: Any) -> Any:
        last = 24
        for place in range(0, 32, 8):
            of_b = builder.shl(b, ir.Constant(SUMS, [last - place] * LANES))
            of_b = builder.ashr(of_b, ir.Constant(SUMS, [last] * LANES))
            of_a = builder.lshr(a, ir.Constant(SUMS, [place] * LANES))
            of_a = builder.and_(of_a, ir.Constant(SUMS, [255] * LANES))
            sums = builder.add(sums, builder.mul(of_a, of_b))
        return sums
