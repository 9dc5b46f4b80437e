"""A matrix without bias, cast to the dtype of what it multiplies: float32 master weights train a bfloat16 product.

A matrix that is only read can be packed: laid out once as oneDNN streams it, in place of the plain rows. Decoding reads
every matrix for each token, so it runs at the rate of memory, and packed rows stream about twice as fast. bfloat16
keeps its bits; a float32 product is summed in another order than the plain one's, the same one for any number of rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron_h.grid import DEPTH, ROWS
from nemotron_h.ops.jit.scalars import said_once


class Linear(nn.Module):
    """x (rows, in) -> (rows, out), in x's dtype."""

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in) and weight (out, in), plain and cast to x's dtype, or packed in it: (rows, out). A row's bits depend
    on that row alone where rows is a multiple of ROWS: channels are filled up with zeros to a multiple of DEPTH."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")  # type: ignore[no-any-return]
    weight, spare = weight.to(x.dtype), -x.shape[-1] % DEPTH
    if spare:
        x, weight = F.pad(x, (0, spare)), F.pad(weight, (0, spare))
    return F.linear(x, weight)


def packed(weight: Tensor) -> Tensor:
    """The same matrix as oneDNN streams it, an opaque tensor of its shape and dtype (`to_dense` is the way back); or
    itself, where that cannot be: on a GPU, in a torch without it, on a CPU without bfloat16 products of its own."""
    if weight.device.type != "cpu" or weight.shape[1] % DEPTH or weight.is_mkldnn:
        return weight
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError) as error:
        said_once(f"matrices cannot be packed here ({str(error).splitlines()[0]}): they are read as they are, slower")
        return weight
