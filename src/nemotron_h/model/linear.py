"""A matrix without bias, cast to the dtype of what it multiplies: float32 master weights train a bfloat16 product."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron_h.grid import DEPTH


class Linear(nn.Module):
    """x (rows, in) -> (rows, out), in x's dtype."""

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in) and weight (out, in), cast to x's dtype: (rows, out). A row's bits depend on that row alone where
    rows is a multiple of ROWS: channels are filled up with zeros to a multiple of DEPTH."""
    weight, spare = weight.to(x.dtype), -x.shape[-1] % DEPTH
    if spare:
        x, weight = F.pad(x, (0, spare)), F.pad(weight, (0, spare))
    return F.linear(x, weight)
