"""What is done to whole rows between the products: picked from a table, added."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.ops.jit import rows as jit
from nemotron_h.ops.jit.compiler import runs
from nemotron_h.ops.jit.scalars import array
from nemotron_h.ops.shapes import expect, wants_gradient


def pick(table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (len(ids), d) of table (n, d) in dtype; ids int64, of 0..n-1. Differentiable. Raises: ShapeError."""
    if wants_gradient(table) or not runs(table) or dtype not in (torch.float32, torch.bfloat16):
        return F.embedding(ids, table).to(dtype)
    places = ids.numpy()
    if len(places) and not 0 <= places.min() <= places.max() < len(table):
        raise ShapeError(f"ids: must lie in 0..{len(table) - 1}; got {places.min()}..{places.max()}")
    out = torch.empty(len(ids), table.shape[1], dtype=dtype)
    jit.pick(len(ids), array(table), places, array(out))
    return out


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, (rows, d) of one dtype each. Differentiable."""
    expect(y, "y", tuple(x.shape), x.dtype)
    if wants_gradient(x, y) or not runs(x, y):
        return x + y
    out = torch.empty(x.shape, dtype=x.dtype)
    jit.add(len(x), array(x), array(y), array(out))
    return out
