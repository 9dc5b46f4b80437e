"""Sums and the largest of a stretch of a row, in LANES partial results. Sums are joined first to last: one order,
whatever the vector width; the largest by halves, which has the same value in any order. A loop over an array of partial
results would store it for each vector; here they stay in a register.

    dot(a, b, first, last)      sum of a * b        total(a, first, last)      top(a, first, last)

a and b one-dimensional float32, contiguous; what does not fill LANES at the end is added one by one.
"""

from collections.abc import Callable
from typing import Any

from nemotron_h.ops.jit.compiler import numba, piece
from nemotron_h.ops.jit.scalars import LANES, f, u

if numba is not None:
    import numpy as np
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    VECTOR = ir.VectorType(ir.FloatType(), LANES)

    def over_vectors(begin: float, join: Callable[[Any, Any, list[Any]], Any], *, halved: bool = False) -> Any:
        """For numba: the partial results of join(builder, partial, vectors) over whole vectors of the arrays from first
        to before last. halved: they are joined, half by half, to one."""

        @intrinsic  # type: ignore[untyped-decorator]
        def partial(typing, arrays, first, last):  # type: ignore[no-untyped-def]
            def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
                given, first, last = args
                kinds = signature.args[0]
                held = [
                    context.make_array(kind)(context, builder, value)
                    for kind, value in zip(kinds, cgutils.unpack_tuple(builder, given), strict=True)
                ]
                found = cgutils.alloca_once_value(builder, ir.Constant(VECTOR, [begin] * LANES))
                step = first.type(LANES)
                with cgutils.for_range_slice(builder, first, last, step) as (place, _):
                    vectors = []
                    for kind, array in zip(kinds, held, strict=True):
                        address = cgutils.get_item_pointer(context, builder, kind, array, [place], wraparound=False)
                        loaded = builder.load(builder.bitcast(address, VECTOR.as_pointer()))
                        loaded.align = 4  # that of a float32: stretches begin anywhere
                        vectors.append(loaded)
                    builder.store(join(builder, builder.load(found), vectors), found)
                whole, left = builder.load(found), LANES
                while halved and left > 1:
                    left //= 2
                    upper = [left + lane % left for lane in range(LANES)]
                    upper = ir.Constant(ir.VectorType(ir.IntType(32), LANES), upper)
                    whole = join(builder, whole, [builder.shuffle_vector(whole, whole, upper)])
                lanes = [builder.extract_element(whole, ir.IntType(32)(lane)) for lane in range(left)]
                return context.make_tuple(builder, signature.return_type, lanes)

            return types.UniTuple(types.float32, 1 if halved else LANES)(arrays, first, last), generate

        return partial

    def _add(builder: Any, partial: Any, vectors: list[Any]) -> Any:
        return builder.fadd(partial, vectors[0])

    def _add_product(builder: Any, partial: Any, vectors: list[Any]) -> Any:
        kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
        fused = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        return builder.call(fused, [*vectors, partial])

    def _larger(builder: Any, partial: Any, vectors: list[Any]) -> Any:
        return builder.select(builder.fcmp_ordered(">", vectors[0], partial), vectors[0], partial)

    sums, products, tops = (
        over_vectors(0.0, _add),
        over_vectors(0.0, _add_product),
        over_vectors(-np.inf, _larger, halved=True),
    )


@piece
def total(a, first, last):  # type: ignore[no-untyped-def]
    """Sum of a from first to before last."""
    whole = first + (last - first) // LANES * LANES
    found = f(0)
    for lane in sums((a,), first, whole):
        found += lane
    for j in range(whole, last):
        found += a[u(j)]
    return found


@piece
def dot(a, b, first, last):  # type: ignore[no-untyped-def]
    """Sum of a * b from first to before last."""
    whole = first + (last - first) // LANES * LANES
    found = f(0)
    for lane in products((a, b), first, whole):
        found += lane
    for j in range(whole, last):
        found += a[u(j)] * b[u(j)]
    return found


@piece
def top(a, first, last):  # type: ignore[no-untyped-def]
    """The largest of a from first to before last, -inf of nothing."""
    whole = first + (last - first) // LANES * LANES
    found = f(-np.inf)
    for lane in tops((a,), first, whole):
        found = max(found, lane)
    for j in range(whole, last):
        found = max(found, a[u(j)])
    return found
