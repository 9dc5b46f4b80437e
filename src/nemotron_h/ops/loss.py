"""Cross-entropy from hidden states, without ever holding all logits.

    loss_i = logsumexp_v(h_i . w_v) - h_i . w_target        dh_i = (softmax_i - onehot_i) W        dW = sum_i (...) h_i

Rows are walked in pieces whose logits fit in PIECE_BYTES, and their gradients are made at once, in place of the logits.
Matrices are met in slices of the vocabulary, so that no second copy of the head is ever needed, and what is summed over
pieces is summed in float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.ops.jit import loss as jit
from nemotron_h.ops.jit.compiler import runs
from nemotron_h.ops.jit.scalars import array
from nemotron_h.ops.shapes import expect, first_order

PIECE_BYTES = 192 * 2**20  # of logits at a time, were they float32
PIECE_ROWS = 1024  # at most: with a small vocabulary, a piece's logits stay in cache
SLICE_WEIGHTS = 2**24  # of the head at a time
IGNORED = -100  # a target that counts for nothing


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of -log p(target) over rows, in nats, a float32 scalar. Divide by the count of targets for the mean.

    hidden (rows, d) in the dtype of the products; weight (vocab, d), cast to it slice by slice; targets (rows,) int64,
    IGNORED where there is none. Gradients reach hidden and weight in their own dtypes.
    """
    rows, width = hidden.shape
    expect(targets, "targets", (rows,), torch.int64)
    expect(weight, "weight", (weight.shape[0], width))
    outside = targets[(targets != IGNORED) & ((targets < 0) | (targets >= weight.shape[0]))]
    if len(outside):
        raise ShapeError(f"targets: must lie in 0..{weight.shape[0] - 1}, or be {IGNORED}; got {outside[0]}")
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _CrossEntropy.apply(hidden, weight, targets, wanted)  # type: ignore[no-any-return,no-untyped-call]


def cross_entropy_definition(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same from all logits at once, as the formula reads."""
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, wanted: bool) -> Tensor:
        rows, vocab = hidden.shape[0], weight.shape[0]
        size = max(1, min(PIECE_ROWS, PIECE_BYTES // (4 * vocab)))
        buffer = torch.empty(min(size, rows), vocab, dtype=hidden.dtype, device=hidden.device)
        if wanted:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        losses = torch.zeros(rows, dtype=torch.float64, device=hidden.device)
        for first in range(0, rows, size):
            piece = slice(first, min(first + size, rows))
            logits = buffer[: piece.stop - first]
            for part, matrix in _slices(weight, hidden.dtype):
                torch.mm(hidden[piece], matrix.T, out=logits[:, part])
            slope = softmax_loss(logits, targets[piece], losses[piece], wanted=wanted)
            if wanted:
                grad_hidden[piece] = _gradients(slope, hidden[piece], weight, grad_weight)
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return losses.sum().float()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad != 1:  # the gradients were made for a loss that counts once; a float32 factor keeps their dtype
            grad_hidden, grad_weight = grad_hidden * grad, grad_weight * grad
        return grad_hidden, grad_weight, None, None


def softmax_loss(logits: Tensor, targets: Tensor, losses: Tensor, *, wanted: bool) -> Tensor:
    """Fill losses (rows,) float64 with -log softmax at the targets. Returns, where wanted, the gradient by the logits;
    it may stand in their place."""
    if runs(logits):
        jit.softmax_loss(len(logits), array(logits), targets.numpy(), losses.numpy(), wanted)
        return logits
    return softmax_loss_torch(logits, targets, losses, wanted=wanted)


def softmax_loss_torch(logits: Tensor, targets: Tensor, losses: Tensor, *, wanted: bool) -> Tensor:
    """The same in torch: where there is no kernel, and beside the kernel in tests."""
    wide = logits.float()
    totals = wide.logsumexp(1)
    counted = targets != IGNORED
    column = targets.where(counted, 0)[:, None]
    losses.copy_((totals - wide.gather(1, column)[:, 0]) * counted)
    if not wanted:
        return logits
    slope = (wide - totals[:, None]).exp()
    slope.scatter_add_(1, column, -torch.ones_like(column, dtype=torch.float32))
    return (slope * counted[:, None]).to(logits.dtype)


def _gradients(slope: Tensor, hidden: Tensor, weight: Tensor, grad_weight: Tensor) -> Tensor:
    """Of the loss by hidden, (rows, d) float32; by weight, added to grad_weight. slope (rows, vocab): by the logits."""
    grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for part, matrix in _slices(weight, hidden.dtype):
        grad_hidden += slope[:, part] @ matrix
        grad_weight[part] += slope[:, part].T @ hidden
    return grad_hidden


def _slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in slices of its rows, each cast."""
    size = max(1, SLICE_WEIGHTS // weight.shape[1])
    for first in range(0, weight.shape[0], size):
        part = slice(first, min(first + size, weight.shape[0]))
        yield part, weight[part].to(dtype)
