"""Steps and their running decay on the chunks of the scan, in one pass. Definition: `ops/steps.py`.

raw: a line of rows, `step` elements from one to the next, float32 or bfloat16 bits; the rest float32. A task is one
head of one chunk; owner, begins, counts, rows (c,) as in `ssd.py`.
"""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.scalars import f, read_at, softplus


@kernel(8)
def forward(
    start: Any, stop: Any, raw: Any, step: Any, bias: Any, A: Any, low: Any, high: Any, owner: Any, begins: Any,
    counts: Any, rows: Any, kept: Any, dt: Any, a: Any,
) -> None:  # fmt: skip
    """dt, a (c h, CHUNK). kept (s h, CHUNK): the steps that each segment's chunk at hand already holds."""
    heads, width = len(bias), dt.shape[1]
    for task in range(start, stop):
        chunk, head = task // heads, task % heads
        if owner[chunk] < 0:  # no place of it is in use
            continue
        begin, end = begins[chunk], begins[chunk] + counts[chunk]
        for j in range(begin):
            dt[task, j] = kept[owner[chunk] * heads + head, j]
        for j in range(begin, end):
            x = read_at(raw, (rows[chunk] + j - begin) * step + head) + bias[head]
            dt[task, j] = min(max(softplus(x), low), high)
        for j in range(end, width):
            dt[task, j] = f(0)
        total = np.float64(0)  # a running sum's bits must not depend on where the call began
        for j in range(width):
            total += np.float64(dt[task, j]) * np.float64(A[head])
            a[task, j] = total
