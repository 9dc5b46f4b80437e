"""The attention mixer: grouped queries, no bias, no position embedding unless the config has RoPE."""

import torch
from torch import Tensor, nn

from nemotron_h.config.model import AttentionConfig
from nemotron_h.model.linear import Linear
from nemotron_h.model.state import AttentionState, Paging
from nemotron_h.ops.attention import attention_paged, attention_whole, rotate
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.shapes import wants_gradient


class Attention(nn.Module):
    """u (rows, hidden) -> (rows, hidden); of `rows` alone where they are given."""

    def __init__(self, config: AttentionConfig, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.keys_values: torch.dtype | None = None  # int8 where they are kept so
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(hidden_size, queries, dtype=dtype, device=device)
        self.k_proj = Linear(hidden_size, keys, dtype=dtype, device=device)
        self.v_proj = Linear(hidden_size, keys, dtype=dtype, device=device)
        self.o_proj = Linear(queries, hidden_size, dtype=dtype, device=device)

    def forward(
        self,
        u: Tensor,
        segments: Segments,
        state: AttentionState | None,
        paging: Paging,
        rows: Tensor | None = None,
    ) -> Tensor:
        config, count = self.config, len(u)
        q = self.q_proj(u).view(count, config.num_heads, config.head_dim)
        k = self.k_proj(u).view(count, config.num_kv_heads, config.head_dim)
        v = self.v_proj(u).view(count, config.num_kv_heads, config.head_dim)
        if config.rope_base is not None:
            positions = segments.positions(u.device)
            q, k = (rotate(t, positions, config.rope_base, config.rope_width) for t in (q, k))
        if wants_gradient(q, k, v):
            mixed = attention_whole(q, k, v, segments)
        else:
            if state is None:  # nothing to remember: pages for this call alone
                pages, dtype = int(paging.table.max()) + 1, self.keys_values or u.dtype
                state = AttentionState.of(config, pages, dtype, u.device, torch.empty)
            state.push(k, v, paging)
            mixed = attention_paged(q, state.keys, state.values, segments, paging.table, state.scales_of_codes)
        mixed = mixed.reshape(count, -1)
        return self.o_proj(mixed if rows is None else mixed[rows])  # type: ignore[no-any-return]
