"""How far each token moves a state-space layer's state, and the decay that its steps add up to.

    dt_t = clamp(softplus(raw_t + bias), limit)        a_t = sum of dt A over the chunk's places up to t

Letters: rows as in `segments.py`, h heads, s segments, c chunks of CHUNK places. A place where nothing stands has dt 0.
"""

from typing import Any

import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.grid import CHUNK
from nemotron_h.ops.activation import softplus
from nemotron_h.ops.jit import steps as jit
from nemotron_h.ops.jit.compiler import runs
from nemotron_h.ops.jit.scalars import array, f, lines
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.shapes import expect, first_order, wants_gradient


def steps(
    raw: Tensor, bias: Tensor, A: Tensor, limit: tuple[float, float], segments: Segments, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dt and a, (c, h, CHUNK) float32 each, of raw (rows, h) any float, bias and A (h) float32, A negative.

    kept (s, h, CHUNK) float32: the steps of each segment's chunk at hand, None where nothing came before; with it there
    is no gradient. Raises: ShapeError, naming the argument.
    """
    heads = raw.shape[-1]
    expect(raw, "raw", (segments.rows, heads))
    expect(bias, "bias", (heads,), torch.float32)
    expect(A, "A", (heads,), torch.float32)
    if kept is not None:
        expect(kept, "kept", (len(segments), heads, CHUNK), torch.float32)
        if wants_gradient(raw, bias, A, kept):
            raise ShapeError("kept: must be None where gradients are wanted; training passes no state")
    elif any(segments.starts):
        raise ShapeError(f"kept: must hold the steps before the rows, which begin at {max(segments.starts)}; got None")
    if not runs(raw):
        return steps_torch(raw, bias, A, limit, segments, kept)
    if wants_gradient(raw, bias, A):
        return _Steps.apply(raw, bias, A, limit, segments)  # type: ignore[no-any-return,no-untyped-call]
    return _steps(raw, bias, A, limit, segments, kept)


def steps_torch(
    raw: Tensor, bias: Tensor, A: Tensor, limit: tuple[float, float], segments: Segments, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in torch: where there is no kernel, and beside the kernel in tests."""
    dt = segments.spread(softplus(raw.float() + bias).clamp(*limit)).transpose(1, 2)
    dt = segments.after_kept(dt, kept, dim=2)
    # float64: a running sum's bits must not depend on where the call began
    return dt, (dt.double() * A.double()[:, None]).cumsum(2).float()


def _steps(
    raw: Tensor, bias: Tensor, A: Tensor, limit: tuple[float, float], segments: Segments, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    heads, count = len(bias), segments.num_chunks
    dt, a = torch.empty(count, heads, CHUNK), torch.empty(count, heads, CHUNK)
    before = kept if kept is not None else torch.empty(0, CHUNK)
    flat = (array(t.view(-1, CHUNK)) for t in (before, dt, a))
    jit.forward(count * heads, *lines(raw), array(bias), array(A), *map(f, limit), *segments.grid, *flat)
    return dt, a


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, raw: Tensor, bias: Tensor, A: Tensor, limit: tuple[float, float], segments: Segments
    ) -> tuple[Tensor, Tensor]:
        dt, a = _steps(raw, bias, A, limit, segments, None)
        ctx.save_for_backward(raw, bias, A, dt)
        ctx.settings = limit, segments
        return dt, a

    @staticmethod
    @first_order
    def backward(ctx: Any, by_dt: Tensor, by_a: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        raw, bias, A, dt = ctx.saved_tensors
        (low, high), segments = ctx.settings
        later = by_a.double().flip(2).cumsum(2).flip(2)  # (c, h, CHUNK): by dt_j A, which every a from j on holds
        by_A = (later * dt).sum((0, 2))
        total = (by_dt + later * A.double()[:, None]).float()
        x = raw.float() + bias
        rows = segments.collect(total.transpose(1, 2))
        kept = segments.collect(dt.transpose(1, 2))
        by_x = rows * torch.sigmoid(x) * ((kept > low) & (kept < high))  # no gradient where it is clamped
        return by_x.to(raw.dtype), by_x.double().sum(0).float(), by_A.float(), None, None
