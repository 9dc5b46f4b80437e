"""The model in float64 from the definitions of the ops: one document at a time, differentiable, and slow."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.config.model import AttentionConfig, LayerConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.ops.attention import attention_definition
from nemotron_h.ops.conv import conv_definition
from nemotron_h.ops.ssd import ssd_recurrence

Weights = Mapping[str, Tensor]


def float64_weights(model: Hybrid) -> dict[str, Tensor]:
    """Leaves of the same values, by the published names."""
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def reference_logits(config: ModelConfig, weights: Weights, tokens: Tensor) -> Tensor:
    """(l, vocab) of one document, tokens (l,)."""
    x = weights["backbone.embeddings.weight"][tokens]
    for index, layer in enumerate(config.layers):
        prefix = f"backbone.layers.{index}."
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        x = x + mixed(layer, own, normed(x, own["norm.weight"], config.norm_epsilon), config.norm_epsilon)
    x = normed(x, weights["backbone.norm_f.weight"], config.norm_epsilon)
    head = "backbone.embeddings.weight" if config.tied_embeddings else "lm_head.weight"
    return x @ weights[head].T


def normed(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return gain * x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon)


def mixed(layer: LayerConfig, own: Weights, u: Tensor, epsilon: float) -> Tensor:
    match layer:
        case MambaConfig():
            return mamba(layer, own, u, epsilon)
        case AttentionConfig():
            return attention(layer, own, u)
        case MlpConfig():
            return torch.relu(u @ own["mixer.up_proj.weight"].T).square() @ own["mixer.down_proj.weight"].T


def mamba(config: MambaConfig, own: Weights, u: Tensor, epsilon: float) -> Tensor:
    h, p, g, n, inner = config.num_heads, config.head_dim, config.num_groups, config.state_size, config.inner_size
    z, xbc, dt = (u @ own["mixer.in_proj.weight"].T).split([inner, config.conv_channels, h], dim=-1)
    before = xbc.new_zeros(config.conv_kernel - 1, config.conv_channels)
    xbc = conv_definition(xbc, own["mixer.conv1d.weight"], own["mixer.conv1d.bias"], before)
    x, B, C = xbc.split([inner, g * n, g * n], dim=-1)
    x, B, C = x.unflatten(1, (h, p)), B.unflatten(1, (g, n)), C.unflatten(1, (g, n))
    dt = F.softplus(dt + own["mixer.dt_bias"]).clamp(*config.time_step_limit)
    A = -torch.exp(own["mixer.A_log"])
    y, _ = ssd_recurrence(x[None], dt[None], A, B[None], C[None], x.new_zeros(1, h, p, n))
    y = (y[0] + own["mixer.D"][:, None] * x).flatten(1)
    gated = (y * F.silu(z)).unflatten(1, (g, inner // g))
    gated = normed(gated, torch.ones((), dtype=u.dtype), epsilon).flatten(1) * own["mixer.norm.weight"]
    return gated @ own["mixer.out_proj.weight"].T


def attention(config: AttentionConfig, own: Weights, u: Tensor) -> Tensor:
    q, k, v = ((u @ own[f"mixer.{name}_proj.weight"].T).unflatten(1, (-1, config.head_dim)) for name in "qkv")
    if config.rope_base is not None:
        q, k = (turned(t, config.rope_base, config.rope_width) for t in (q, k))
    return attention_definition(q, k, v).flatten(1) @ own["mixer.o_proj.weight"].T


def turned(x: Tensor, base: float, width: int) -> Tensor:
    """Channel pairs (i, i + width / 2) of x (l, heads, d) as complex numbers, turned by l * base^(-2 i / width)."""
    half = width // 2
    speeds = base ** (-torch.arange(half, dtype=x.dtype) * 2 / width)
    angles = torch.arange(len(x), dtype=x.dtype)[:, None, None] * speeds
    pairs = torch.complex(x[..., :half], x[..., half:width]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag, x[..., width:]), dim=-1)
