"""Cross-entropy from hidden states, without ever holding all logits.

    loss_i = logsumexp_v(h_i . w_v) - h_i . w_target            dh_i = (softmax_i - onehot_i) W       dW = sum_i (...) h_i

The vocabulary is walked in slices. The first walk finds each row's log-sum-exp, the second the gradients, each slice of
dW in one product, so nothing is summed across slices in a narrow dtype. Where all logits fit in SLICE_BYTES there is one
slice and its logits are kept between the walks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.ops.shapes import expect

SLICE_BYTES = 96 * 2**20  # of float32 logits in memory at a time
IGNORED = -100  # a target that counts for nothing


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of -log p(target) over rows, in nats, a float32 scalar. Divide by the count of targets for the mean.

    hidden (rows, d) in the dtype of the products; weight (vocab, d), cast to it slice by slice; targets (rows,) int64,
    IGNORED where there is none. Gradients reach hidden and weight in their own dtypes.
    """
    rows, width = hidden.shape
    expect(targets, "targets", (rows,), torch.int64)
    expect(weight, "weight", (weight.shape[0], width))
    return _CrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-any-return]


def cross_entropy_definition(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same from all logits at once, as the formula reads."""
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        vocab = weight.shape[0]
        slices = _slices(vocab, max(1, SLICE_BYTES // (4 * hidden.shape[0])))
        totals = torch.full(targets.shape, -torch.inf, device=hidden.device)
        chosen = torch.zeros_like(totals)
        logits = None
        for part in slices:
            logits = _logits(hidden, weight[part])
            totals = torch.logaddexp(totals, logits.logsumexp(1)) if len(slices) > 1 else logits.logsumexp(1)
            inside, column = _within(targets, part)
            chosen = torch.where(inside, logits.gather(1, column[:, None])[:, 0], chosen)
        counted = targets != IGNORED
        loss = ((totals - chosen) * counted).sum()
        if any(ctx.needs_input_grad):
            kept = logits if len(slices) == 1 else None
            ctx.save_for_backward(*_gradients(hidden, weight, targets, totals, slices, kept))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad != 1:  # the gradients were made in the forward walk, for a loss that counts once
            grad_hidden, grad_weight = (
                grad_hidden * grad.to(grad_hidden.dtype),
                grad_weight * grad.to(grad_weight.dtype),
            )
        return grad_hidden, grad_weight, None


def _gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, totals: Tensor, slices: list[slice], kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of the loss by hidden and by weight. kept: the logits, where one slice holds them all; overwritten."""
    grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    grad_weight = torch.empty_like(weight)
    for part in slices:
        slope = kept if kept is not None else _logits(hidden, weight[part])
        slope.sub_(totals[:, None]).exp_()
        inside, column = _within(targets, part)
        slope.scatter_add_(1, column[:, None], -inside.float()[:, None])
        slope.mul_((targets != IGNORED)[:, None])
        narrow = slope.to(hidden.dtype)
        grad_hidden += narrow @ weight[part].to(hidden.dtype)
        grad_weight[part] = narrow.T @ hidden
    return grad_hidden.to(hidden.dtype), grad_weight


def _slices(vocab: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, vocab)) for begin in range(0, vocab, size)]


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden, weight.to(hidden.dtype)).float()


def _within(targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in this slice of the vocabulary, and in which of its columns (0 for the others)."""
    inside = (targets >= part.start) & (targets < part.stop)
    return inside, torch.where(inside, targets - part.start, 0)
