"""Grouped-query causal attention: its definition, one masked call for training, and absolute key blocks for the rest.

    out_i = sum_{j <= i} softmax_j(q_i . k_j / sqrt(d)) v_j        query head f reads key head f // (f_heads / k_heads)

Letters: rows as in `segments.py`, f query heads, k key-value heads, d head width.

Blocks: a sequence's keys stand in blocks of BLOCK on its own grid, zeros beyond the last one. A query meets each block
in one product, the last block at full size under a mask, and the partial results are merged in the blocks' order by
their log-sum-exps. Query heads that share a key head are folded into the query's length and padded to a multiple of
ROWS. So a query's bits depend on its place alone.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.grid import BLOCK, ROWS, round_up
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.shapes import expect, wants_gradient

Blocks = Sequence[tuple[Tensor, Tensor]]  # of one sequence: keys (k, BLOCK, d) and values (k, BLOCK, d), in order


def attention_definition(q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
    """One sequence as the formula reads: q (l, f, d) at places start.., k, v (start + l, kv, d). Returns (l, f, d)."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("ifd,jfd->fij", q, k) / math.sqrt(q.shape[2])
    i, j = torch.arange(q.shape[0])[:, None] + start, torch.arange(k.shape[0])
    return torch.einsum("fij,jfd->ifd", scores.masked_fill(j > i, -torch.inf).softmax(-1), v)


def attention_whole(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Each segment by itself from its first token on, differentiable: q (rows, f, d), k and v (rows, kv, d).

    The block form cannot be trained through: the CPU operator's log-sum-exp has no gradient, and merging by it under
    autograd would give wrong gradients in silence.
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


def attention_blocks(q: Tensor, segments: Segments, blocks: Sequence[Blocks]) -> Tensor:
    """Queries q (rows, f, d) of each segment against its sequence's blocks, which hold the new keys already.

    Returns (rows, f, d) in q's dtype, zeros for padding. No gradient.
    """
    if wants_gradient(q):
        raise ShapeError("q: must not want a gradient, which blocks do not have; use attention_whole")
    out = torch.zeros_like(q)
    for start, begin, length, own in zip(segments.starts, segments.begins, segments.lengths, blocks, strict=True):
        done = 0
        while done < length:  # the piece of the segment that ends in one block
            block, first = divmod(start + done, BLOCK)
            count = min(length - done, BLOCK - first)
            rows = slice(begin + done, begin + done + count)
            out[rows] = _attend(q[rows], own[: block + 1], first)
            done += count
    return out


def _attend(q: Tensor, blocks: Blocks, first: int) -> Tensor:
    """q (l, f, d) at places first.. of the last block."""
    length, heads, width = q.shape
    kv_heads = blocks[0][0].shape[0]
    group = heads // kv_heads
    expect(blocks[-1][0], "keys of a block", (kv_heads, BLOCK, width), q.dtype)
    folded = q.view(length, kv_heads, group, width).permute(1, 2, 0, 3).reshape(1, kv_heads, group * length, width)
    later = torch.arange(BLOCK, device=q.device) > torch.arange(first, first + length, device=q.device)[:, None]
    mask = torch.zeros(length, BLOCK, dtype=q.dtype, device=q.device).masked_fill_(later, -torch.inf)
    spare = round_up(group * length, ROWS) - group * length
    folded = F.pad(folded, (0, 0, 0, spare))
    mask = F.pad(mask.repeat(group, 1), (0, 0, 0, spare))[None, None]
    out, total = None, None
    for keys, values in blocks[:-1]:
        out, total = _merged(out, total, *_block_call(folded, keys[None], values[None], None))
    keys, values = blocks[-1]
    out, total = _merged(out, total, *_block_call(folded, keys[None], values[None], mask))
    attended = out[0, :, : group * length].view(kv_heads, group, length, width)
    return attended.permute(2, 0, 1, 3).reshape(length, heads, width).to(q.dtype)


def _block_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """One block: the output and the log-sum-exp (1, heads, l) of each query, both float32."""
    heads = q.shape[1]
    if q.device.type == "cpu":
        if heads == 1:  # one head alone is multiplied by several threads at once, with other bits: give it company
            q, k, v = (t.expand(-1, 2, -1, -1) for t in (q, k, v))
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)
        return out[:, :heads].float(), total[:, :heads]
    scores = (q.float() @ k.float().transpose(-1, -2)) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask.float()
    return scores.softmax(-1) @ v.float(), scores.logsumexp(-1)


def _merged(out: Tensor | None, total: Tensor | None, more: Tensor, more_total: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over two sets of keys from the softmax over each."""
    if out is None or total is None:
        return more, more_total
    top = torch.maximum(total, more_total)
    weight, more_weight = (total - top).exp_(), (more_total - top).exp_()
    both = weight + more_weight
    return out * (weight / both)[..., None] + more * (more_weight / both)[..., None], top + both.log()


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
