"""The state-space recurrence of Mamba-2: its definition, and the chunked form that every call uses.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t

Letters: b sequences, l tokens, h heads, p head width, n state size, g groups (h/g heads share B and C),
         rows as in `segments.py`, s segments, c chunks of CHUNK places.

Within a chunk, with a = cumsum(dt A) and i, j places of it:
    y_i = sum_{j <= i} (C_i . B_j) exp(a_i - a_j) dt_j x_j  +  exp(a_i) C_i . boundary
and the boundary moves on once, when the next chunk begins:
    boundary' = exp(a_end) boundary + sum_j exp(a_end - a_j) dt_j x_j B_j^T

A row is always the same sums in the same order, against the places of its chunk, whether it is read among others or
generated alone: that is what makes the bits independent of how a prompt was cut. A decode step is a chunk with few new
rows, replayed from the boundary; it reads the state and does not write it, but at the one row in CHUNK that begins the
next chunk. The kernel takes a decay below e^-60 for nothing, which the torch form does not.

Source: Dao and Gu 2024, arXiv:2405.21060, section 6 for the chunked form.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.grid import CHUNK
from nemotron_h.ops.jit import ssd as jit
from nemotron_h.ops.jit.compiler import runs
from nemotron_h.ops.jit.scalars import array
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.shapes import expect, first_order, wants_gradient


@dataclass(frozen=True, slots=True)
class Past:
    """What the segments of a call bring along: the state at the beginning of the chunk at hand, and its inputs."""

    boundary: Tensor  # (s, h, n, p), float32, moved on in place: states stand turned, as the product with C reads them
    x: Tensor  # (s, h, CHUNK, p), the inputs' dtype: a head's lie together, as it reads them
    B: Tensor  # (s, g, n, CHUNK), likewise, turned


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
    inputs: Tensor,
    dt: Tensor,
    a: Tensor,
    D: Tensor,
    segments: Segments,
    past: Past | None,
    *,
    num_groups: int,
    state_size: int,
) -> Tensor:
    """y_t = h_t C_t + D x_t of every row.

    Shapes: inputs (rows, h p + 2 g n) any float: x, B and C side by side; dt, a (c, h, CHUNK) float32, as `steps` gives
        them; D (h) float32.
    past: None where every segment begins here; with it there is no gradient. Its boundary moves on, in place, to the
        beginning of each segment's last chunk.
    Returns: y (rows, h p) float32, zeros for padding.
    Raises: ShapeError, naming the argument.
    """
    (heads,), g, n, s = D.shape, num_groups, state_size, len(segments)
    inner = inputs.shape[-1] - 2 * g * n
    if g < 1 or heads % g:
        raise ShapeError(f"num_groups: must divide the {heads} heads of D; got {g}")
    if inner < heads or inner % heads:
        raise ShapeError(f"inputs: must have as many columns of x for each of {heads} heads; got {inner} in all")
    expect(inputs, "inputs", (segments.rows, inner + 2 * g * n))
    for name, tensor in (("dt", dt), ("a", a)):
        expect(tensor, name, (segments.num_chunks, heads, CHUNK), torch.float32)
    expect(D, "D", (heads,), torch.float32)
    if past is None and any(segments.starts):
        raise ShapeError(f"past: must hold what lies before the rows, which begin at {max(segments.starts)}; got None")
    if past is not None:
        expect(past.boundary, "past.boundary", (s, heads, n, inner // heads), torch.float32)
        expect(past.x, "past.x", (s, heads, CHUNK, inner // heads), inputs.dtype)
        expect(past.B, "past.B", (s, g, n, CHUNK), inputs.dtype)
        if wants_gradient(inputs, dt, a, D, past.boundary, past.x, past.B):
            raise ShapeError("past: must be None where gradients are wanted; training passes no state")
    if not runs(inputs):
        return ssd_torch(inputs, dt, a, D, segments, past, g, n)
    dt, a = dt.contiguous(), a.contiguous()
    if wants_gradient(inputs, dt, a, D):
        return _Ssd.apply(inputs, dt, a, D, segments, g, n)  # type: ignore[no-any-return,no-untyped-call]
    return _ssd(inputs.contiguous(), dt, a, D, segments, past, g, n)[0]


def ssd_torch(
    inputs: Tensor, dt: Tensor, a: Tensor, D: Tensor, segments: Segments, past: Past | None, g: int, n: int
) -> Tensor:
    """The same as matrix products in torch: where there is no kernel, and beside the kernel in tests."""
    c, h, _ = dt.shape
    inner = inputs.shape[1] - 2 * g * n
    p = inner // h
    x, B, C = (segments.spread(t) for t in inputs.split([inner, g * n, g * n], dim=-1))  # (c, CHUNK, columns)
    kept_x, kept_B, boundary = (past.x, past.B.flatten(1, 2), past.boundary) if past is not None else (None, None, None)
    x = segments.after_kept(x.view(c, CHUNK, h, p).transpose(1, 2), kept_x, dim=2).float()  # (c, h, CHUNK, p)
    B = segments.after_kept(B.transpose(1, 2), kept_B, dim=2).float().reshape(c * g, n, CHUNK)
    C = C.float().view(c, CHUNK, g, n).transpose(1, 2).reshape(c * g, CHUNK, n)
    places = torch.arange(CHUNK, device=inputs.device)
    decay = (a[..., None] - a[..., None, :]).masked_fill(places > places[:, None], -torch.inf).exp()
    scores = torch.bmm(C, B).view(c, g, 1, CHUNK, CHUNK)
    mixed = (scores * decay.view(c, g, h // g, CHUNK, CHUNK)).view(c * h, CHUNK, CHUNK)
    xdt = (x * dt[..., None]).contiguous()
    y = torch.bmm(mixed, xdt.view(c * h, CHUNK, p)).view(c, h, CHUNK, p) + x * D[:, None, None]

    before = _boundaries(xdt, a, B, segments, boundary)
    if before is not None:
        states = before.view(c, g, h // g, n, p).transpose(2, 3).reshape(c * g, n, h // g * p)
        read = torch.bmm(C, states).view(c, g, CHUNK, h // g, p).transpose(2, 3).reshape(c, h, CHUNK, p)
        y = y + read * a.exp()[..., None]
    return segments.collect(y.transpose(1, 2)).reshape(segments.rows, inner)


def _boundaries(xdt: Tensor, a: Tensor, B: Tensor, segments: Segments, boundary: Tensor | None) -> Tensor | None:
    """The state before each chunk, (c, h, n, p), None for all zeros. boundary moves on to each segment's last one."""
    c, h, _, p = xdt.shape
    g, n = B.shape[0] // c, B.shape[1]
    if max(segments.chunks) == 1 and (boundary is None or c == len(segments)):
        return boundary
    state = boundary if boundary is not None else xdt.new_zeros(len(segments), h, n, p)
    weighted = xdt * (a[..., -1:] - a).exp()[..., None]  # (c, h, CHUNK, p)
    columns = weighted.view(c, g, h // g, CHUNK, p).transpose(2, 3).reshape(c * g, CHUNK, h // g * p)
    writes = torch.bmm(B, columns).view(c, g, n, h // g, p).transpose(2, 3).reshape(c, h, n, p)
    gains = a[..., -1].exp()
    befores = []
    for index, (first, count) in enumerate(zip(segments.chunk_begins, segments.chunks, strict=True)):
        own = state[index]
        befores.append(own)
        for chunk in range(first, first + segments.room[index] - 1):
            if chunk < first + count - 1:
                own = own * gains[chunk][:, None, None] + writes[chunk]
            befores.append(own)
    before = torch.stack(befores)
    if boundary is not None:
        boundary.copy_(before[segments.chunk_runs.sum(1) - 1])
    return before


def _ssd(
    inputs: Tensor, dt: Tensor, a: Tensor, D: Tensor, segments: Segments, past: Past | None, g: int, n: int,
    befores_kept: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and the state before each chunk where befores_kept."""
    c, h, _ = dt.shape
    inner = inputs.shape[1] - 2 * g * n
    p = inner // h
    owner, begins, counts, rows = segments.grid
    kept_x = array(past.x.view(-1, p) if past is not None else torch.empty(0, p, dtype=inputs.dtype))
    kept_B = array(past.B.view(-1, CHUNK) if past is not None else torch.empty(0, CHUNK, dtype=inputs.dtype))
    boundary = past.boundary.view(-1, p) if past is not None else torch.empty(0, p)
    scores, y = torch.empty(len(inputs), g * CHUNK), torch.empty(len(inputs), inner)
    array(y)[segments.tokens :] = 0
    before = torch.empty(c * h * n if befores_kept and max(segments.chunks) > 1 else 0, p)
    jit.score(c * g, array(inputs), inner, g, n, owner, begins, counts, rows, kept_B, array(scores))
    jit.scan(
        len(segments) * h, array(inputs), g, array(scores), array(dt.view(-1, CHUNK)), array(a.view(-1, CHUNK)),
        array(D), begins, counts, rows, segments.chunk_runs, kept_x, kept_B, array(boundary), array(y), array(before),
    )  # fmt: skip
    return y, before


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, dt: Tensor, a: Tensor, D: Tensor, segments: Segments, g: int, n: int
    ) -> Tensor:
        inputs = inputs.contiguous()
        y, before = _ssd(inputs, dt, a, D, segments, None, g, n, befores_kept=True)
        ctx.save_for_backward(inputs, dt, a, D, before)
        ctx.settings = segments, g
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, dt, a, D, before = ctx.saved_tensors
        segments, g = ctx.settings
        c, h, _width = dt.shape
        _, _, counts, rows = segments.grid
        by_y, by_inputs = array(grad.contiguous()), torch.empty_like(inputs)
        by_inputs[segments.tokens :] = 0
        by_dt, by_a, by_writes, by_D = (
            torch.zeros_like(dt),
            torch.zeros_like(a),
            torch.empty_like(before),
            torch.empty(c * h),
        )
        flat_dt, flat_a, slope_dt, slope_a = (array(t.view(-1, CHUNK)) for t in (dt, a, by_dt, by_a))
        if len(before):
            jit.states_gradient(c * h, array(inputs), g, h, flat_a, counts, rows, by_y, array(by_writes))
            jit.pass_back(len(segments) * h, array(before), flat_a, segments.chunk_runs, h, array(by_writes), slope_a)
        jit.gradient(
            c * g, array(inputs), g, flat_dt, flat_a, array(D), counts, rows, array(before), array(by_writes), by_y,
            array(by_inputs), slope_dt, slope_a, array(by_D),
        )  # fmt: skip
        return by_inputs, by_dt, by_a, by_D.view(c, h).double().sum(0).float(), None, None, None


def keep_inputs(inputs: Tensor, dt: Tensor, segments: Segments, x: Tensor, B: Tensor, kept_dt: Tensor) -> None:
    """Overwrite x and B, as `Past` has them, with the inputs of each segment's chunk at hand, zeros beyond them; and
    kept_dt (s, h, CHUNK) with its steps, of dt (c, h, CHUNK)."""
    (_, g, n, _), (_, h, _, p) = B.shape, x.shape
    if runs(inputs):
        _, begins, counts, rows = segments.grid
        kept = array(x.view(-1, p)), array(B.view(-1, CHUNK))
        steps = array(dt.view(-1, CHUNK)), array(kept_dt.view(-1, CHUNK))
        jit.keep(len(segments), array(inputs), g, begins, counts, rows, segments.chunk_runs, *kept, *steps)
        return
    x_new, B_new, _ = (segments.spread(t) for t in inputs.split([h * p, g * n, g * n], dim=-1))
    x_new, B_new = (
        segments.after_kept(x_new.view(-1, CHUNK, h, p).transpose(1, 2), x, dim=2),
        segments.after_kept(B_new.transpose(1, 2), B.flatten(1, 2), dim=2),
    )
    last = segments.chunk_runs.sum(1) - 1
    kept_dt.copy_(dt[last])
    x.copy_(x_new[last])
    B.copy_(B_new[last].view(B.shape))
