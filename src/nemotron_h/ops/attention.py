"""Grouped-query causal attention: its definition, one masked call for training, and absolute key blocks for the rest.

    out_i = sum_{j <= i} softmax_j(q_i . k_j / sqrt(d)) v_j        query head f reads key head f // (f_heads / k_heads)

Letters: rows as in `segments.py`, f query heads, k key-value heads, d head width.

Pages: a sequence's keys and values stand in blocks of BLOCK tokens on its own grid, anywhere in a pool; a table says
where.
Keys stand turned, (d, BLOCK), as the product of one query reads them. A query meets its blocks in order under a
running softmax, so its bits depend on its place alone, with s_j = q . k_j / sqrt(d):
    top' = max(top, max_j s_j)      sum' = sum e^(top - top') + sum_j e^(s_j - top')      out' likewise

Keys and values may be kept in int8, k_j = code_j scale_j, a scale for each place and head: then s_j is
(q . code_j) scale_j, and e^(s_j - top') scale_j multiplies the code of a value. New ones are rounded before the first
query reads them: a query does not know which were written in its own call.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.grid import BLOCK, DEPTH, ROWS, round_up
from nemotron_h.ops.jit import attention as jit
from nemotron_h.ops.jit.compiler import runs
from nemotron_h.ops.jit.pairs import ADDS_PAIRS
from nemotron_h.ops.jit.scalars import array, f
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.shapes import expect, wants_gradient

LEVELS = 127  # the largest code of a key or value in int8


def attention_definition(q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
    """One sequence as the formula reads: q (l, f, d) at places start.., k, v (start + l, kv, d). Returns (l, f, d)."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("ifd,jfd->fij", q, k) / math.sqrt(q.shape[2])
    i, j = torch.arange(q.shape[0])[:, None] + start, torch.arange(k.shape[0])
    return torch.einsum("fij,jfd->ifd", scores.masked_fill(j > i, -torch.inf).softmax(-1), v)


def attention_whole(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Each segment by itself from its first token on, differentiable: q (rows, f, d), k and v (rows, kv, d).

    Its bits are not those of `attention_paged`: training computes all of a sequence at once.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    if segments.even:
        shape = (len(segments), segments.lengths[0])
        return _causal_call(*(t.unflatten(0, shape) for t in (q, k, v))).flatten(0, 1)
    parts = [
        _causal_call(*(t[None, begin : begin + length] for t in (q, k, v)))[0]
        for begin, length in zip(segments.begins, segments.lengths, strict=True)
    ]
    return torch.cat((*parts, q.new_zeros(segments.rows - segments.tokens, *q.shape[1:])))


def _causal_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(b, l, heads, d) each."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def keep_rows(
    k: Tensor, v: Tensor, pages: Tensor, places: Tensor, keys: Tensor, values: Tensor, scales: Tensor | None = None
) -> None:
    """Write rows of k and v (rows, kv, d) into keys (pages, kv, d, BLOCK) and values (pages, kv, BLOCK, d).

    Row t goes to page pages[t], place places[t], both (rows,) int64; to none where the page is -1.

    keys and values are of k's dtype; or int8, with scales (pages, 2, kv, BLOCK) float32, of keys and of values.
    """
    if runs(k) and k.is_contiguous() and v.is_contiguous():
        rows = len(pages), array(k.flatten(1)), array(v.flatten(1)), pages.numpy(), places.numpy()
        kept = array(keys.view(-1, BLOCK)), array(values.view(-1, values.shape[-1]))
        if scales is None:
            jit.keep(*rows, *kept)
        else:
            jit.keep_rounded(*rows, *kept, array(scales.view(-1, BLOCK)), f(LEVELS))
        return
    new = (pages >= 0).nonzero().flatten()
    pages, places, new = (t.to(k.device) for t in (pages[new], places[new], new))
    for part, (rows_of, kept_in) in enumerate(((k[new], keys.transpose(2, 3)), (v[new], values))):
        if scales is None:
            kept_in[pages, :, places] = rows_of
        else:
            kept_in[pages, :, places], scales[pages, part, :, places] = rounded(rows_of)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., d) in int8, and the scale of each row (...) float32, its largest number being 127: x is code scale."""
    x = x.float()
    scale = x.abs().amax(-1) / LEVELS
    codes = (x / torch.where(scale > 0, scale, 1)[..., None]).round().clamp(-LEVELS, LEVELS)
    return codes.to(torch.int8), scale


def attention_paged(
    q: Tensor, keys: Tensor, values: Tensor, segments: Segments, table: Tensor, scales: Tensor | None = None
) -> Tensor:
    """Queries of each segment against its sequence's pages, which hold the new keys already. No gradient.

    q (rows, f, d); keys (pages, k, d, BLOCK), values (pages, k, BLOCK, d) in q's dtype, or in int8 with scales
    (pages, 2, k, BLOCK) float32; table (s, blocks) int64: the pages of each sequence, in order. Returns (rows, f, d) in
    q's dtype, zeros for padding. Raises: ShapeError, naming the argument.
    """
    rows, heads, width = q.shape
    kv_heads = keys.shape[1]
    if heads % kv_heads:
        raise ShapeError(f"keys: must have heads that divide the {heads} of q; got {kv_heads}")
    kept = q.dtype if scales is None else torch.int8
    expect(keys, "keys", (len(keys), kv_heads, width, BLOCK), kept)
    expect(values, "values", (len(keys), kv_heads, BLOCK, width), kept)
    if scales is not None:
        expect(scales, "scales", (len(keys), 2, kv_heads, BLOCK), torch.float32)
    expect(q, "q", (segments.rows, heads, width))
    blocks = max(-(-(start + length) // BLOCK) for start, length in zip(segments.starts, segments.lengths, strict=True))
    expect(table, "table", (len(segments), max(blocks, table.shape[-1])), torch.int64)
    least, most = (int(of) for of in (table.numpy().min(), table.numpy().max()))
    if least < 0 or most >= len(keys):
        raise ShapeError(f"table: must hold pages of 0..{len(keys) - 1}; got {least}..{most}")
    if wants_gradient(q, keys, values):
        raise ShapeError("q: must not want a gradient, which pages do not have; use attention_whole")
    if not runs(q):
        return attention_paged_torch(q, keys, values, segments, table, scales)
    out = torch.empty(rows, heads * width, dtype=q.dtype)
    array(out)[segments.tokens :] = 0
    pieces = segments.pieces
    queries = array(q.reshape(rows, heads * width).contiguous())
    given = array(keys.view(-1, BLOCK)), array(values.view(-1, width))
    rest = array(table), *pieces, kv_heads, array(out)
    if scales is None and ADDS_PAIRS and q.dtype == torch.bfloat16 and width % 2 == 0:
        jit.attend_pairs(len(pieces[0]) * kv_heads, queries.view(np.uint32), *given, *rest)
    else:
        of_codes = scales.view(-1, BLOCK) if scales is not None else torch.empty(0, BLOCK)
        jit.attend(len(pieces[0]) * kv_heads, queries, *given, array(of_codes), *rest)
    return out.view(rows, heads, width)


def attention_paged_torch(
    q: Tensor, keys: Tensor, values: Tensor, segments: Segments, table: Tensor, scales: Tensor | None = None
) -> Tensor:
    """The same in torch: where there is no kernel, and beside the kernel in tests."""
    out = torch.zeros_like(q)
    for owner, row, count, first in zip(*(t.tolist() for t in segments.pieces), strict=True):
        if count == 0:
            continue
        out[row : row + count] = _attend(q[row : row + count], keys, values, table[owner].tolist(), first, scales)
    return out


def _attend(q: Tensor, keys: Tensor, values: Tensor, pages: list[int], first: int, scales: Tensor | None) -> Tensor:
    """q (l, f, d) at places first.., all in one block."""
    length, heads, width = q.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    folded = q.float().view(length, kv_heads, group, width).permute(1, 2, 0, 3).reshape(kv_heads, group * length, width)
    spare = round_up(group * length, ROWS) - group * length
    # one head alone is multiplied by several threads at once, with other bits: it gets company
    company = 2 if kv_heads == 1 else 1
    folded = F.pad(folded / math.sqrt(width), (0, -width % DEPTH, 0, spare)).repeat(company, 1, 1)
    last, place = divmod(first, BLOCK)
    later = torch.arange(BLOCK, device=q.device) > torch.arange(place, place + length, device=q.device)[:, None]
    unwritten = later[-1, :, None]
    later = F.pad(later.repeat(group, 1), (0, 0, 0, spare))
    top = folded.new_full((*folded.shape[:2], 1), -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(folded)
    for block in range(last + 1):
        page_keys = F.pad(keys[pages[block]].float(), (0, 0, 0, -width % DEPTH)).repeat(company, 1, 1)
        scores = torch.bmm(folded, page_keys)
        of_keys, of_values = scales[pages[block], :, :, None].repeat(1, company, 1, 1) if scales is not None else (1, 1)
        scores = scores * of_keys
        if block == last:
            scores = scores.masked_fill(later, -torch.inf)
        before, top = top, torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, gain = (scores - top).exp_(), (before - top).exp_()
        total = total * gain + weights.sum(-1, keepdim=True)
        weights = weights * of_values
        page_values = values[pages[block]].float()
        if block == last:  # what is not written yet may be anything, and NaN times a weight of 0 is NaN
            page_values = page_values.masked_fill(unwritten, 0)
            weights = weights.masked_fill(later, 0)
        page_values = F.pad(page_values, (0, -width % DEPTH)).repeat(company, 1, 1)
        out = out * gain + torch.bmm(weights, page_values)
    attended = (out / total)[:kv_heads, : group * length, :width].reshape(kv_heads, group, length, width)
    return attended.permute(2, 0, 1, 3).reshape(length, heads, width).to(q.dtype)


def rotate(x: Tensor, positions: Tensor, base: float, width: int) -> Tensor:
    """RoPE on the first width channels of each head: x (rows, heads, d), positions (rows,). Returns x's dtype.

    Channel i of the first half is rotated with channel i of the second by the angle position * base^(-2 i / width).
    Source: Su et al. 2021, arXiv:2104.09864, in the half-split layout of the published Transformers.
    """
    half = width // 2
    speeds = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * speeds  # float64: the angle of a far position keeps its fraction of a turn
    cos, sin = (f(angles).float()[:, None] for f in (torch.cos, torch.sin))  # (rows, 1, half)
    first, second, rest = x.float().split([half, half, x.shape[-1] - width], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x.dtype)
