"""The Mamba-2 mixer (arXiv:2504.03624, section 2.1; Dao and Gu 2024, arXiv:2405.21060).

    z | x | B | C | dt = in_proj(u)
    x | B | C = silu(conv(x | B | C))            dt = clamp(softplus(dt + dt_bias), time_step_limit)
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T   y_t = h_t C_t + D x_t           A = -exp(A_log)
    out = out_proj(grouped_norm(y * silu(z)))

Letters: h heads, p head width, n state size, g groups, rows as in `ops/segments.py`.
"""

import torch
from torch import Tensor, nn

from nemotron_h.config.model import MambaConfig
from nemotron_h.model.linear import Linear
from nemotron_h.model.state import MambaState
from nemotron_h.ops.conv import causal_conv
from nemotron_h.ops.norm import gated_rms_norm
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.ssd import ssd
from nemotron_h.ops.steps import steps


class Mamba(nn.Module):
    """u (rows, hidden) -> (rows, hidden); of `rows` alone where they are given."""

    _rates: tuple[tuple[int, int], Tensor] | None = None  # decay rates, and of which A_log

    def __init__(
        self, config: MambaConfig, hidden_size: int, epsilon: float, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.config, self.epsilon = config, epsilon
        inner, channels, heads = config.inner_size, config.conv_channels, config.num_heads
        self.in_proj = Linear(hidden_size, inner + channels + heads, dtype=dtype, device=device)
        self.conv1d = Taps(channels, config.conv_kernel, dtype=dtype, device=device)
        # float32: what is small in them decides how long the layer remembers
        self.dt_bias, self.A_log, self.D = (
            nn.Parameter(torch.empty(heads, dtype=torch.float32, device=device)) for _ in range(3)
        )
        self.norm = Gain(inner, dtype=dtype, device=device)
        self.out_proj = Linear(inner, hidden_size, dtype=dtype, device=device)

    def forward(self, u: Tensor, segments: Segments, state: MambaState | None, rows: Tensor | None = None) -> Tensor:
        config = self.config
        z, xbc, raw = self.in_proj(u).split([config.inner_size, config.conv_channels, config.num_heads], dim=-1)
        weight, bias = self.conv1d.weight.to(u.dtype), self.conv1d.bias.to(u.dtype)
        convolved = causal_conv(xbc, weight, bias, segments, state.conv if state is not None else None)
        A, limit = self.decay_rates(), config.time_step_limit
        dt, a = steps(raw, self.dt_bias, A, limit, segments, state.dt if state is not None else None)
        y = ssd(
            convolved, dt, a, self.D, segments, state.past if state is not None else None,
            num_groups=config.num_groups, state_size=config.state_size,
        )  # fmt: skip
        if state is not None:
            state.push(xbc, convolved, dt, segments)
        if rows is not None:
            y, z = y[rows], z[rows]
        normed = gated_rms_norm(y, z, self.norm.weight.to(u.dtype), config.num_groups, self.epsilon)
        return self.out_proj(normed)  # type: ignore[no-any-return]

    def decay_rates(self) -> Tensor:
        """A (heads,), kept as long as A_log is what it was and wants no gradient."""
        if torch.is_grad_enabled() and self.A_log.requires_grad:
            return -torch.exp(self.A_log)
        version = (id(self.A_log), 0 if self.A_log.is_inference() else self.A_log._version)
        if self._rates is None or self._rates[0] != version:
            self._rates = version, -torch.exp(self.A_log.detach())
        return self._rates[1]


class Taps(nn.Module):
    """The conv's weight (channels, 1, kernel) and bias (channels), under their published names."""

    def __init__(self, channels: int, kernel: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(channels, dtype=dtype, device=device))

    def pack(self) -> None:
        """Let each tap's weights lie side by side, as they are read; the shape stays."""
        turned = self.weight.detach().transpose(0, 2).contiguous().transpose(0, 2)
        self.weight = nn.Parameter(turned, requires_grad=False)


class Gain(nn.Module):
    """A norm's gain (channels)."""

    def __init__(self, channels: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, dtype=dtype, device=device))
