"""What the kernels share: bfloat16 as 16 bits, and an exp of multiplies and adds.

Every lane of a vector and every tail computes the same operations, so a value's bits do not depend on its place.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from nemotron_h.ops.jit.compiler import inline, numba
from nemotron_h.ops.jit.kernels import RECORDING

if numba is not None:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic, overload

f = np.float32
u = np.uintp  # of an index: one that might be negative is looked at for each element, and no loop becomes vector code
LANES = 16  # partial sums of a long sum, and columns of a product: one order, whatever the vector width
STRIDE = 64  # rows of one part of a gradient that is summed over rows


def array(tensor: Tensor) -> Any:
    """The tensor's memory as numpy: float32, or the bits of bfloat16 as uint16."""
    if RECORDING.get() is not None:
        with no_dispatch():  # nothing is computed here, and to be watched takes far longer than this
            return _array(tensor)
    return _array(tensor)


def _array(tensor: Tensor) -> Any:
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def lines(tensor: Tensor) -> tuple[Any, int]:
    """A matrix whose rows may lie apart, such as some columns of another: its memory as one line, and the elements from
    row to row."""
    if tensor.stride(1) != 1:
        tensor = tensor.contiguous()
    rows, columns = tensor.shape
    step = tensor.stride(0)
    return array(tensor.as_strided(((rows - 1) * step + columns,), (1,))), step


if numba is not None:

    def ask_memory(builder: Any, address: Any) -> None:
        """The line of the cache at an address comes while other things are done. It need not be anybody's."""
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        to_read, soon, data = number(0), number(2), number(1)
        builder.call(ask, [builder.bitcast(address, cgutils.voidptr_t), to_read, soon, data])

    @intrinsic  # type: ignore[untyped-decorator]
    def as_float(typing, bits):  # type: ignore[no-untyped-def]
        return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(
            args[0], ir.FloatType()
        )

    @intrinsic  # type: ignore[untyped-decorator]
    def as_bits(typing, number):  # type: ignore[no-untyped-def]
        return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(
            args[0], ir.IntType(32)
        )

    @intrinsic  # type: ignore[untyped-decorator]
    def fused(typing, a, b, c):  # type: ignore[no-untyped-def]
        """a b + c, rounded once."""

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.fma(*args)

        return types.float32(types.float32, types.float32, types.float32), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def wide(typing):  # type: ignore[no-untyped-def]
        """Loops of the function around it use the widest vectors, where LLVM by itself takes half of them."""

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite knows only names
            return context.get_dummy_value()

        return types.void(), generate


@inline
def from_bfloat16(bits):  # type: ignore[no-untyped-def]
    return as_float(np.uint32(bits) << np.uint32(16))


@inline
def to_bfloat16(x):  # type: ignore[no-untyped-def]
    """Round to nearest, ties to even, as torch does."""
    bits, nan = as_bits(x), np.uint32(np.isnan(x))
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded * (np.uint32(1) - nan) + np.uint32(0x7FC0) * nan)


@inline
def exp(x):  # type: ignore[no-untyped-def]
    """e^x in float32 within 2 units in the last place (Cephes' polynomial), for x in -87.3..88.3 and clamped to it."""
    wide()
    x = min(max(x, f(-87.3)), f(88.3))
    n = np.float32(np.rint(x * f(1.44269504)))
    r = fused(n, f(2.12194440e-4), fused(n, f(-0.693359375), x))
    p = fused(f(1.9875691500e-4), r, f(1.3981999507e-3))
    p = fused(p, r, f(8.3334519073e-3))
    p = fused(p, r, f(4.1665795894e-2))
    p = fused(p, r, f(1.6666665459e-1))
    p = fused(p, r, f(5.0000001201e-1))
    return fused(p, r * r, r + f(1)) * as_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@inline
def sigmoid(x):  # type: ignore[no-untyped-def]
    return f(1) / (f(1) + exp(-x))


@inline
def log1p(x):  # type: ignore[no-untyped-def]
    """log(1 + x) in float32 within 2 units in the last place (Cephes' polynomial), for x in 0..1."""
    w = f(1) + x
    lost = (x - (w - f(1))) / w  # what the sum rounded away
    halved = w > f(1.41421356)
    z = (w * f(0.5) if halved else w) - f(1)
    p = f(7.0376836292e-2) * z - f(1.1514610310e-1)
    p = p * z + f(1.1676998740e-1)
    p = p * z - f(1.2420140846e-1)
    p = p * z + f(1.4249322787e-1)
    p = p * z - f(1.6668057665e-1)
    p = p * z + f(2.0000714765e-1)
    p = p * z - f(2.4999993993e-1)
    p = p * z + f(3.3333331174e-1)
    small = p * z * z * z - f(0.5) * z * z + lost
    return z + small + f(0.693359375) - f(2.12194440e-4) if halved else z + small


@inline
def softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + e^x) = max(x, 0) + log1p(e^-|x|)"""
    return max(x, f(0)) + log1p(exp(-abs(x)))


def read(array: Any, i: int, j: int) -> Any:
    """array[i, j] as float32."""


def read_at(line: Any, k: int) -> Any:
    """line[k] as float32."""


def write(array: Any, i: int, j: int, value: Any) -> None:
    """array[i, j] = value, rounded to the array's dtype."""


if numba is not None:

    @overload(read, inline="always")  # type: ignore[untyped-decorator]
    def _read(array, i, j):  # type: ignore[no-untyped-def]
        if array.dtype == types.uint16:
            return lambda array, i, j: from_bfloat16(array[u(i), u(j)])
        if array.dtype == types.int8:
            return lambda array, i, j: np.float32(array[u(i), u(j)])
        return lambda array, i, j: array[u(i), u(j)]

    @overload(read_at, inline="always")  # type: ignore[untyped-decorator]
    def _read_at(line, k):  # type: ignore[no-untyped-def]
        if line.dtype == types.uint16:
            return lambda line, k: from_bfloat16(line[u(k)])
        return lambda line, k: line[u(k)]

    @overload(write, inline="always")  # type: ignore[untyped-decorator]
    def _write(array, i, j, value):  # type: ignore[no-untyped-def]
        if array.dtype == types.uint16:

            def narrow(array, i, j, value):  # type: ignore[no-untyped-def]
                array[u(i), u(j)] = to_bfloat16(value)

            return narrow

        def plain(array, i, j, value):  # type: ignore[no-untyped-def]
            array[u(i), u(j)] = value

        return plain
