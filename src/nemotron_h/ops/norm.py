"""RMSNorm, and the grouped gated RMSNorm of a Mamba-2 layer.

    y = w * x / sqrt(mean(x^2) + epsilon)                        the gain is w, not 1 + w
    v = y * silu(z);  each of g groups of channels is normed by itself;  then the gain

The gate comes before the norm, and the norm is per group: facts other ports got wrong. Statistics are float32.
Source: arXiv:2504.03624 and NVIDIA's published modeling code.
"""

import torch.nn.functional as F
from torch import Tensor

from nemotron_h.ops.activation import silu
from nemotron_h.ops.shapes import expect


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x (..., d) any float, gain (d). Returns x's dtype; computed in float32."""
    expect(gain, "gain", x.shape[-1:])
    return F.rms_norm(x.float(), x.shape[-1:], gain.float(), epsilon).to(x.dtype)


def gated_rms_norm(y: Tensor, z: Tensor, gain: Tensor, num_groups: int, epsilon: float) -> Tensor:
    """y (rows, d) float32, z (rows, d) any float, gain (d). Returns z's dtype; computed in float32."""
    rows, channels = y.shape
    expect(z, "z", (rows, channels))
    expect(gain, "gain", (channels,))
    gated = (y * silu(z)).view(rows, num_groups, channels // num_groups)
    normed = F.rms_norm(gated, gated.shape[-1:], None, epsilon).view(rows, channels)
    return (normed * gain.float()).to(z.dtype)
