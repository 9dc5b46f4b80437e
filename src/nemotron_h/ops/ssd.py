"""The state-space recurrence of Mamba-2: its definition, and the chunked form that every call uses.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t

Letters: b sequences, l tokens, h heads, p head width, n state size, g groups (r = h/g heads share B and C),
         s segments, c chunks of CHUNK places, m queries of a chunk (the places whose outputs are wanted).

Within a chunk, with a = cumsum(dt A) and i, j places of it:
    y_i = sum_{j <= i} (C_i . B_j) exp(a_i - a_j) dt_j x_j  +  exp(a_i) C_i . boundary
and the boundary moves on once, when the next chunk begins:
    boundary' = exp(a_end) boundary + sum_j exp(a_end - a_j) dt_j x_j B_j^T

A query is always the same products of the same shape, against all CHUNK places of its chunk, whether it is read among
others or generated alone: that is what makes the bits independent of how a prompt was cut. A decode step is a chunk
with few queries, replayed from the boundary; it reads the state and does not write it.

Source: Dao and Gu 2024, arXiv:2405.21060, section 6 for the chunked form.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.grid import CHUNK
from nemotron_h.ops.jit import ssd as jit
from nemotron_h.ops.jit.scalars import array, runs
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.shapes import expect, first_order, wants_gradient


def ssd_recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token at a time, as the formula reads. Every other path must equal it.

    x (b, l, h, p), dt (b, l, h) after softplus, A (h) negative, B and C (b, l, g, n), state (b, h, p, n).
    Returns: y (b, l, h, p) and the state after the last token.
    """
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(heads_per_group, dim=2) for t in (B, C))  # (b, l, h, n)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)  # (b, h)
        write = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = decay[..., None, None] * state + write  # (b, h, p, n)
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return torch.stack(outputs, dim=1), state


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    segments: Segments,
    boundary: Tensor | None,
    *,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Outputs of every query of every chunk, and the state at each segment's last boundary.

    Shapes: x (c, h, CHUNK, p), B (c, g, CHUNK, n) any float; dt (c, CHUNK, h) float32, after softplus, zero where
        nothing stands yet; A (h) float32, negative; C (c, g, m, n) any float;
        boundary (s, h, p, n) float32, the state at the beginning of each segment's first chunk, None for zeros;
        D (h) float32: y_t = h_t C_t + D x_t where it is given.
    Returns: y (c, h, m, p) float32; (s, h, p, n) float32, the state at the beginning of each segment's last chunk, or
        None where it is what was given.
    Raises: ShapeError, naming the argument.
    """
    for name, tensor in (("x", x), ("C", C)):
        if tensor.ndim != 4:
            raise ShapeError(f"{name}: must have 4 dimensions; got {tensor.ndim}")
    c, h, _, p = x.shape
    g, _, n = C.shape[1:]
    if g < 1 or h % g:
        raise ShapeError(f"C: must have groups that divide the {h} heads of x; got {g}")
    expect(x, "x", (segments.num_chunks, h, CHUNK, p))
    expect(dt, "dt", (c, CHUNK, h), torch.float32)
    expect(A, "A", (h,), torch.float32)
    expect(B, "B", (c, g, CHUNK, n), C.dtype)
    expect(C, "C", (c, g, segments.queries, n))
    if boundary is not None:
        expect(boundary, "boundary", (len(segments), h, p, n), torch.float32)
    # float64: a running sum's bits must not depend on where the call began
    a = (dt.double() * A.double()).cumsum(1).float().transpose(1, 2).contiguous()  # (c, h, CHUNK)
    dt = dt.transpose(1, 2).contiguous()
    if D is None:
        D = A.new_zeros(h)
    expect(D, "D", (h,), torch.float32)
    given = [t for t in (x, dt, A, B, C, D, boundary) if t is not None]
    if (any(segments.starts) or boundary is not None) and wants_gradient(*given):
        raise ShapeError("boundary: must be None where gradients are wanted; training passes no state")
    if not runs(x, B, C):
        return ssd_torch(x, dt, a, B, C, D, segments, boundary)
    y, after = _Ssd.apply(x, dt, a, B, C, D, segments, boundary)  # type: ignore[no-untyped-call]
    return y, after


def ssd_torch(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    segments: Segments,
    boundary: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The same as matrix products in torch: where there is no kernel, and beside the kernel in tests.

    dt (c, h, CHUNK); a (c, h, CHUNK), the running sum of dt A; the rest as in `ssd`.
    """
    c, h, _, p = x.shape
    g, m, n = C.shape[1:]
    xdt = (x.float() * dt[..., None]).contiguous()  # (c, h, CHUNK, p)
    B = B.float().contiguous().view(c * g, CHUNK, n)
    C = C.float().contiguous().view(c * g, m, n)
    places = segments.query_places.to(x.device)[:, None].expand(c, h, m)
    a_queries = a.gather(2, places)  # (c, h, m)
    later = torch.arange(CHUNK, device=x.device) > places[..., None]  # (c, h, m, CHUNK)
    decay = (a_queries[..., None] - a[..., None, :]).masked_fill(later, -torch.inf).exp()
    scores = torch.bmm(C, B.transpose(1, 2)).view(c, g, 1, m, CHUNK)
    mixed = (scores * decay.view(c, g, h // g, m, CHUNK)).view(c * h, m, CHUNK)
    own = x.gather(2, places[..., None].expand(c, h, m, p)).float() * D[:, None, None]
    y = torch.bmm(mixed, xdt.view(c * h, CHUNK, p)).view(c, h, m, p) + own

    before, after = _boundaries(xdt, a, B, segments, boundary)
    if before is not None:
        read = torch.bmm(C, before.reshape(c * g, h // g * p, n).transpose(1, 2))  # (c g, m, r p)
        read = read.view(c, g, m, h // g, p).transpose(2, 3).reshape(c, h, m, p)
        y = y + read * a_queries.exp()[..., None]
    return y, after


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        segments: Segments,
        boundary: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        c, h, _, p = x.shape
        g, m, n = C.shape[1:]
        x, C = x.contiguous().view(-1, p), C.contiguous().view(-1, n)
        B = B.contiguous().view(-1, n)
        dt, a = dt.view(-1, CHUNK), a.view(-1, CHUNK)
        first, counts = (np.array(t) for t in (segments.chunk_begins, segments.chunks))
        start = None if boundary is None else boundary.transpose(2, 3).contiguous().view(-1, p)  # (s h n, p)
        before = start if start is not None else torch.empty(0, p)
        after = None
        if max(segments.chunks) > 1:
            added, before = torch.empty(c * h * n, p), torch.empty(c * h * n, p)
            jit.writes(c * h, array(x), array(dt), array(a), array(B), h // g, array(added))
            start = torch.zeros(len(segments) * h * n, p) if start is None else start.clone()
            jit.pass_on(len(segments) * h, array(added), array(a), first, counts, h, array(start), array(before))
            after = start.view(-1, h, n, p).transpose(2, 3)
        y = torch.empty(c * m, h * p)
        jit.outputs(
            c * g, array(x), array(dt), array(a), array(B), array(C), array(D.contiguous()), array(before), h // g,
            segments.query_begins.numpy(), segments.new_begins.numpy(), segments.query_counts.numpy(), array(y),
        )  # fmt: skip
        ctx.save_for_backward(x, dt, a, B, C, D, before)
        ctx.shape, ctx.chunks = (c, h, g, m, n, p), (first, counts)
        if after is not None:
            ctx.mark_non_differentiable(after)
        return y.view(c, m, h, p).transpose(1, 2), after

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, a, B, C, D, before = ctx.saved_tensors
        c, h, g, m, n, p = ctx.shape
        by_y = grad.transpose(1, 2).contiguous().view(c * m, h * p)
        by_x, by_B, by_C, by_D = torch.empty_like(x), torch.empty_like(B), torch.empty_like(C), torch.empty(c * h)
        by_dt, by_a, by_writes = torch.zeros_like(dt), torch.zeros_like(a), torch.empty_like(before)
        if len(before):
            jit.states_gradient(c * h, array(a), array(C), array(by_y), h // g, h, array(by_writes))
            jit.pass_back(
                len(ctx.chunks[0]) * h, array(before), array(a), *ctx.chunks, h, array(by_writes), array(by_a)
            )
        inputs = (array(t) for t in (x, dt, a, B, C, D.contiguous(), before, by_writes, by_y))
        jit.gradient(c * g, *inputs, h // g, *(array(t) for t in (by_x, by_dt, by_a, by_B, by_C, by_D)))
        return (
            by_x.view(c, h, CHUNK, p),
            by_dt.view(c, h, CHUNK),
            by_a.view(c, h, CHUNK),
            by_B.view(c, g, CHUNK, n),
            by_C.view(c, g, m, n),
            by_D.view(c, h).double().sum(0).float(),
            None,
            None,
        )


def settled(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, boundary: Tensor) -> Tensor:
    """The state after the chunk at hand, (s, h, p, n): the boundary moved on by the inputs since.

    x (s, h, CHUNK, p), dt (s, CHUNK, h), B (s, g, CHUNK, n), with zeros where nothing stands yet.
    """
    a = (dt.double() * A.double()).cumsum(1).float().transpose(1, 2)
    return _moved(x.float() * dt.transpose(1, 2)[..., None], a, B.float(), boundary)


def _boundaries(
    xdt: Tensor, a: Tensor, B: Tensor, segments: Segments, boundary: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The state before each chunk, (c, h, p, n), None for all zeros; and before each segment's last one."""
    c, h, _, p = xdt.shape
    g, n = B.shape[0] // c, B.shape[2]
    counts = segments.chunks
    longest = max(counts)
    if longest == 1:
        return boundary, None
    state = boundary if boundary is not None else xdt.new_zeros(len(counts), h, p, n)
    gains, writes = a[..., -1].exp(), _writes(xdt, a, B.view(c, g, CHUNK, n))
    if len(set(counts)) == 1:
        steps = [state]
        # unbind: the gradient of slicing one step at a time would fill a whole tensor for each
        for gain, write in zip(
            gains.view(-1, longest, h, 1, 1).unbind(1)[:-1],
            writes.view(-1, longest, h, p, n).unbind(1)[:-1],
            strict=True,
        ):
            state = state * gain + write
            steps.append(state)
        return torch.stack(steps, 1).view(c, h, p, n), state
    befores, afters = [], []
    for index, (first, count) in enumerate(zip(segments.chunk_begins, counts, strict=True)):
        state_s = state[index]
        befores.append(state_s)
        for chunk in range(first, first + count - 1):
            state_s = state_s * gains[chunk][:, None, None] + writes[chunk]
            befores.append(state_s)
        afters.append(state_s)
    return torch.stack(befores), torch.stack(afters)


def _writes(xdt: Tensor, a: Tensor, B: Tensor) -> Tensor:
    """What each chunk adds to the state by its end: (c, h, p, n)."""
    c, h, _, p = xdt.shape
    g, n = B.shape[1], B.shape[3]
    weighted = xdt * (a[..., -1:] - a).exp()[..., None]
    rows = weighted.transpose(2, 3).reshape(c * g, h // g * p, CHUNK)
    return torch.bmm(rows, B.reshape(c * g, CHUNK, n)).view(c, h, p, n)


def _moved(xdt: Tensor, a: Tensor, B: Tensor, boundary: Tensor) -> Tensor:
    return boundary * a[..., -1].exp()[..., None, None] + _writes(xdt, a, B)
