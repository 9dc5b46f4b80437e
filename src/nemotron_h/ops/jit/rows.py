"""Rows picked from a table, added, squared. Definition: `ops/rows.py`, and of relu2 `ops/activation.py`.

All (rows, channels), float32 or bfloat16 bits.
"""

from typing import Any

from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.scalars import f, read, write


@kernel(8)
def pick(start: Any, stop: Any, table: Any, ids: Any, out: Any) -> None:
    """out[t] = table[ids[t]]."""
    for t in range(start, stop):
        for j in range(out.shape[1]):
            write(out, t, j, read(table, ids[t], j))


@kernel(16)
def add(start: Any, stop: Any, x: Any, y: Any, out: Any) -> None:
    """out = x + y, rounded once."""
    for t in range(start, stop):
        for j in range(out.shape[1]):
            write(out, t, j, read(x, t, j) + read(y, t, j))


@kernel(8)
def relu2(start: Any, stop: Any, x: Any, out: Any) -> None:
    """out = max(x, 0)^2; what is no number stays so."""
    for t in range(start, stop):
        for j in range(out.shape[1]):
            value = max(read(x, t, j), f(0))
            write(out, t, j, value * value)
