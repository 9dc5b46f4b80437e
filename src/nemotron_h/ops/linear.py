"""Rows times a matrix (out, in): plain, or laid out for reading.

    y = x W^T, a row's bits depending on that row alone

A matrix that is only read is laid out once, in place of the plain rows. Decoding reads every matrix for each token, so
it runs at the rate of memory.

    in blocks   float32, and bfloat16 on a CPU without products of it: a kernel of ours multiplies any number of rows
    packed      bfloat16 on a CPU with them, as oneDNN streams it; few rows by a kernel of ours, which is faster

That second kernel must have oneDNN's bits, since other calls go that way: how oneDNN cuts its sums is tried out on the
matrix itself, and where nothing fits to the bit, oneDNN does it all.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.grid import DEPTH, ROWS, round_up
from nemotron_h.ops.jit import floats
from nemotron_h.ops.jit import linear as jit
from nemotron_h.ops.jit.blocks import OUTS
from nemotron_h.ops.jit.compiler import runs, said_once
from nemotron_h.ops.jit.scalars import array
from nemotron_h.ops.shapes import expect, wants_gradient

AT_ONCE = 512  # rows that a matrix in blocks is multiplied by: their sums and a piece of them stay in a core's cache
MOST_ROWS = 32  # of a call that the kernel for packed matrices takes
PACKED_ROWS = 4 * ROWS  # rows that oneDNN multiplies by a packed matrix are filled up to a multiple
DEPTHS = (1024, 512)  # inputs of one chain of sums, where there are more of them than that; else one chain of all
TRIED_OUTPUTS = 2**18  # another depth changes about one output in 5,000


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in) and weight (out, in), plain and cast to x's dtype, or packed in it: (rows, out). A row's bits depend
    on that row alone where rows is a multiple of ROWS, or of what a machine asks instead (`model/check.py`): channels
    are filled up with zeros to a multiple of DEPTH, and rows for a packed matrix to one of PACKED_ROWS.

    Raises: ShapeError for an x that a packed matrix does not take.
    """
    if weight.is_mkldnn:
        check_reading(x, tuple(weight.shape), weight.dtype)
        spare = -len(x) % PACKED_ROWS
        filled = F.pad(x, (0, 0, 0, spare)) if spare else x
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(filled, weight, None, "none", [], "")
        return out[: len(x)]
    weight, spare = weight.to(x.dtype), -x.shape[-1] % DEPTH
    if spare:
        x, weight = F.pad(x, (0, spare)), F.pad(weight, (0, spare))
    return F.linear(x, weight)


def check_reading(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse what a matrix (out, in) that is laid out for reading cannot take, and a gradient, which would end here in
    silence."""
    expect(x, "x", (len(x), shape[1]), dtype)
    if wants_gradient(x):
        raise ShapeError("x: must not want a gradient, which a packed matrix does not give; multiply by a plain one")


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


@dataclass(frozen=True)
class Blocks:
    """A matrix (outs, ins) in blocks of OUTS outputs, filled up with zeros, as our kernel reads it.

    values: float32 (blocks, ins, OUTS), or bfloat16 (blocks, ceil(ins / 2), OUTS, 2).
    """

    shape: tuple[int, int]
    values: Tensor
    most_rows: ClassVar[float] = math.inf

    @staticmethod
    def of(weight: Tensor) -> "Blocks":
        """weight: float32 or bfloat16."""
        outs, ins = weight.shape
        inputs = 2 if weight.dtype == torch.bfloat16 else 1  # of a word
        spare = 0, -ins % inputs, 0, -outs % OUTS
        filled = F.pad(weight, spare) if any(spare) else weight  # it copies, whatever there is to fill
        blocks = filled.reshape(-1, OUTS, filled.shape[1] // inputs, inputs).transpose(1, 2)
        return Blocks((outs, ins), (blocks if inputs == 2 else blocks.squeeze(-1)).contiguous())

    def plain(self) -> Tensor:
        """The matrix that `of` was given."""
        outs, ins = self.shape
        return self.values.transpose(1, 2).flatten(0, 1).flatten(1)[:outs, :ins].contiguous()

    @cached_property
    def words(self) -> Any:
        return self.values.view(-1).view(torch.uint32).numpy()

    def __call__(self, x: Tensor) -> Tensor:
        """x (rows, ins) in the matrix's dtype -> (rows, outs), for any number of rows."""
        check_reading(x, self.shape, self.values.dtype)
        rows, (outs, ins), (blocks, words) = len(x), self.shape, self.values.shape[:2]
        x, out = x.contiguous(), torch.empty(rows, outs, dtype=x.dtype)
        inputs = 4 // x.itemsize  # of a word
        if rows <= floats.FEW and ins == words * inputs:
            times = floats.few_floats_times if inputs == 1 else floats.few_pairs_times
            times(blocks, x.view(torch.uint32).numpy(), self.words, array(out))
            return out
        given, wanted = array(x), array(out)
        for begin in range(0, rows, AT_ONCE):
            some, of_some = given[begin : begin + AT_ONCE], wanted[begin : begin + AT_ONCE]
            shape = -(-words * inputs // floats.NEAR), len(some), floats.NEAR
            ordered = torch.empty(shape, dtype=torch.uint32).numpy()
            floats.in_order(len(some), some, inputs, words, ordered)
            floats.many_times(blocks, ordered, inputs, words, self.words, of_some)
        return out


def in_blocks(weight: Tensor) -> Blocks | None:
    """The matrix as our kernel reads it, where that is the way to read it here."""
    if weight.is_mkldnn or not runs(weight) or (weight.dtype == torch.bfloat16 and jit.PRODUCTS):
        return None
    return Blocks.of(weight)


@dataclass(frozen=True)
class FewRows:
    """A packed matrix as our kernel reads it: its memory, which is the tensor's own."""

    weight: Tensor
    words: Any  # all of the memory, a pair of weights a word
    depth: int  # inputs of a chain
    most_rows: ClassVar[float] = MOST_ROWS

    def __call__(self, x: Tensor) -> Tensor:
        """x (rows, in) bfloat16 -> (rows, out), for any number of rows."""
        outs, into = self.weight.shape
        check_reading(x, (outs, into), self.weight.dtype)
        out = torch.empty(len(x), outs, dtype=torch.bfloat16)
        pairs = array(x.contiguous()).view(np.uint32).reshape(-1)
        blocks = -(-outs // OUTS)
        jit.few_rows(blocks, pairs, len(x), into // 2, self.words, self.depth // 2, array(out))
        return out


def few_rows(weight: Tensor, depth: int | None = None) -> FewRows | None:
    """How our kernel reads a matrix with oneDNN's bits; None where it cannot.

    depth: of another matrix of that shape, found before; None: found now.
    """
    words = _words(weight)
    if words is None:
        return None
    depth = depth or _depth(weight, words)
    return None if depth is None else FewRows(weight, words, depth)


def _words(weight: Tensor) -> Any:
    """The memory of a packed bfloat16 matrix, None where it is not laid out in blocks of OUTS."""
    if not (jit.RUNS and weight.is_mkldnn and weight.dtype == torch.bfloat16):
        return None
    outs, into = weight.shape
    count = round_up(outs, OUTS) * round_up(into // 2, jit.PAIRS_PADDED)
    try:
        address, size = torch.ops.mkldnn.data_ptr(weight), torch.ops.mkldnn._nbytes(weight)
    except (AttributeError, RuntimeError):
        return None
    return np.ctypeslib.as_array((ctypes.c_uint32 * count).from_address(address)) if size == 4 * count else None


def _depth(weight: Tensor, words: Any) -> int | None:
    """Inputs of a chain of oneDNN's sums: those that give its bits on enough products to tell; None: none does."""
    outs, into = weight.shape
    x = torch.randn(max(MOST_ROWS, TRIED_OUTPUTS // outs), into, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = linear(x, weight)
    for depth in (*(depth for depth in DEPTHS if depth < into), into):
        if torch.equal(FewRows(weight, words, depth)(x), want):
            return depth
    return None
