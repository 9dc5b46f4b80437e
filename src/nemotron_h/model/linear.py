"""A matrix without bias, cast to the dtype of what it multiplies: float32 master weights train a bfloat16 product."""

import torch
from torch import Tensor, nn

from nemotron_h.ops.linear import MOST_ROWS, FewRows, few_rows, linear, packed


class Linear(nn.Module):
    """x (rows, in) -> (rows, out), in x's dtype."""

    few_rows: FewRows | None = None  # how a packed matrix is read by few rows

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.few_rows(x) if self.few_rows is not None and len(x) <= MOST_ROWS else linear(x, self.weight)

    def pack(self, like: "Linear | None" = None) -> None:
        """Lay the matrix out for reading; it is then not trained any more. like: another of that shape, packed."""
        self.weight = nn.Parameter(packed(self.weight.detach()), requires_grad=False)
        if like is None:
            self.few_rows = few_rows(self.weight)
        elif like.few_rows is not None:
            self.few_rows = few_rows(self.weight, like.few_rows.depth)
