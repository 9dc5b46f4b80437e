"""Softmax, its loss and its gradient, in place of the logits. Definition: `ops/loss.py`."""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.scalars import exp, f, kernel, prange, read, write

LANES = 16


@kernel
def softmax_loss(logits: Any, targets: Any, losses: Any, wanted: Any) -> None:
    """losses (rows,) float64: -log softmax of each row at its target, 0 where the target is negative.

    logits (rows, vocab) float32 or bfloat16 bits; where wanted, they become the loss's gradient by them.
    """
    rows, vocab = logits.shape
    whole = vocab // LANES * LANES
    for t in prange(rows):
        tops, sums = np.full(LANES, -np.inf, np.float32), np.zeros(LANES, np.float32)
        for j in range(0, whole, LANES):
            for k in range(LANES):
                tops[k] = max(tops[k], read(logits, t, j + k))
        top = f(-np.inf)
        for k in range(LANES):
            top = max(top, tops[k])
        for j in range(whole, vocab):
            top = max(top, read(logits, t, j))
        for j in range(0, whole, LANES):
            for k in range(LANES):
                sums[k] += exp(read(logits, t, j + k) - top)
        total = f(0)
        for k in range(LANES):
            total += sums[k]
        for j in range(whole, vocab):
            total += exp(read(logits, t, j) - top)
        target = targets[t]
        losses[t] = 0.0
        if target >= 0:
            losses[t] = np.float64(top) + np.log(np.float64(total)) - np.float64(read(logits, t, target))
        if wanted:
            scale = f(1) / total if target >= 0 else f(0)
            at = read(logits, t, max(target, 0))
            for j in range(vocab):
                write(logits, t, j, exp(read(logits, t, j) - top) * scale)
            if target >= 0:
                write(logits, t, target, exp(at - top) * scale - f(1))
