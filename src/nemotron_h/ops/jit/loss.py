"""Softmax, its loss and its gradient, in place of the logits. Definition: `ops/loss.py`."""

from typing import Any

import numpy as np

from nemotron_h.ops.jit.kernels import kernel
from nemotron_h.ops.jit.scalars import LANES, exp, f, read, write


@kernel(16)
def softmax_loss(start: Any, stop: Any, logits: Any, targets: Any, losses: Any, wanted: Any) -> None:
    """losses (rows,) float64: -log softmax of each row at its target, 0 where the target is negative.

    logits (rows, vocab) float32 or bfloat16 bits; where wanted, they become the loss's gradient by them.
    """
    vocab = logits.shape[1]
    whole = vocab // LANES * LANES
    row = np.empty(vocab, np.float32)
    for t in range(start, stop):
        target = targets[t]
        tops, sums = np.full(LANES, -np.inf, np.float32), np.zeros(LANES, np.float32)
        for j in range(0, whole, LANES):
            for k in range(LANES):
                tops[k] = max(tops[k], read(logits, t, j + k))
        top = f(-np.inf)
        for k in range(LANES):
            top = max(top, tops[k])
        for j in range(whole, vocab):
            top = max(top, read(logits, t, j))
        for j in range(vocab):
            row[j] = exp(read(logits, t, j) - top)
        for j in range(0, whole, LANES):
            for k in range(LANES):
                sums[k] += row[j + k]
        total = f(0)
        for k in range(LANES):
            total += sums[k]
        for j in range(whole, vocab):
            total += row[j]
        losses[t] = 0.0
        if target >= 0:
            losses[t] = np.float64(top) + np.log(np.float64(total)) - np.float64(read(logits, t, target))
        if wanted:
            scale = f(1) / total if target >= 0 else f(0)
            at = row[max(target, 0)] * scale
            for j in range(vocab):
                write(logits, t, j, row[j] * scale)
            if target >= 0:
                write(logits, t, target, at - f(1))
