"""One optimizer step: the mean loss of its batches, its gradient, clipped, applied."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_h.data.batches import Batch
from nemotron_h.errors import DataError
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.ops.loss import IGNORED, cross_entropy

Loss = Callable[[Hybrid, Batch], tuple[Tensor, int]]  # the sum over targets, in nats, and how many targets


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per target
    gradient_norm: float  # before clipping
    targets: int


def next_token_loss(model: Hybrid, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy of each token after the ones before it in its document."""
    vocab, lowest, highest = model.config.vocab_size, batch.inputs.min(), max(batch.inputs.max(), batch.targets.max())
    if lowest < 0 or highest >= vocab:
        got = lowest if lowest < 0 else highest
        raise DataError(f"tokens: must lie in 0..{vocab - 1}; got {got}; take the shard of the model's own tokenizer")
    device = model.device
    tokens, targets, documents = (
        torch.from_numpy(array).to(device) for array in (batch.inputs, batch.targets, batch.documents)
    )
    segments = model.segments(tokens, documents=documents)
    hidden = model.hidden(tokens.flatten(), segments)[: segments.tokens]
    return cross_entropy(hidden, model.head_weight, targets.flatten()), int((targets != IGNORED).sum())


def train_step(
    model: Hybrid,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Iterable[Batch],
    loss_of: Loss,
    *,
    clip_norm: float,
) -> StepResult:
    """Move the weights once by the mean loss over all targets. Raises: DataError where it is not finite."""
    total, count = 0.0, 0
    for batch in batches:
        loss, targets = loss_of(model, batch)
        loss.backward()
        total, count = total + loss.item(), count + targets
    if count == 0:
        raise DataError("batch: must hold at least one target; got none")
    parameters = [p for p in model.parameters() if p.grad is not None]
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.div_(count)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm, foreach=True).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise DataError(f"loss: must be finite; got {total} with gradient norm {norm}; lower the learning rate")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return StepResult(total / count, norm, count)


@torch.no_grad()
def total_loss(model: Hybrid, batches: Iterable[Batch], loss_of: Loss) -> tuple[float, int]:
    """Nats over all batches together, and how many targets."""
    total, count = 0.0, 0
    for batch in batches:
        loss, targets = loss_of(model, batch)
        total, count = total + loss.item(), count + targets
    return total, count
