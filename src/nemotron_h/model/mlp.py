"""The feed-forward mixer: down(relu(up u)^2), no gate, no bias."""

import torch
from torch import Tensor, nn

from nemotron_h.config.model import MlpConfig
from nemotron_h.model.linear import Linear
from nemotron_h.ops.activation import relu2


class Mlp(nn.Module):
    """u (rows, hidden) -> (rows, hidden)."""

    def __init__(self, config: MlpConfig, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, config.intermediate_size, dtype=dtype, device=device)
        self.down_proj = Linear(config.intermediate_size, hidden_size, dtype=dtype, device=device)

    def forward(self, u: Tensor) -> Tensor:
        return self.down_proj(relu2(self.up_proj(u)))  # type: ignore[no-any-return]
