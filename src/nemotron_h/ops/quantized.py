"""Rows times a matrix in integers: 8 bits each, or 4 in two levels; the rows are rounded to integers too.

    y[t, o] = (sum_i codes[t, i] integers[o, i]) x_scale[t] scale[o]

    8 bits      integers in -127..127, a scale per output
    4 bits      integers = (code - 8) s, code in 0..15, s one of SCALES per output and GROUP inputs, a scale per output
    rows        codes = round(x / x_scale), x_scale[t] = max_i |x[t, i]| / 127, or / 32,767 where 8 bits are too few

Sums of integers are exact in any order, and what follows them is one formula: a row's bits depend on that row alone,
however many are computed, by whatever code. So one arithmetic holds here by nature.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.grid import round_up
from nemotron_h.ops.jit import quantized as jit
from nemotron_h.ops.jit.blocks import OUTS
from nemotron_h.ops.jit.compiler import runs
from nemotron_h.ops.jit.nibbles import GROUP, SCALES
from nemotron_h.ops.jit.scalars import array, f
from nemotron_h.ops.shapes import expect, wants_gradient

LEVELS = {8: 127, 16: 32767}  # the largest of a row's codes, by their bits
LEAST = float(jit.LEAST)
MOST_INPUTS = 2**16 - 256  # of a matrix: its sums of products stay within 32 bits
AT_ONCE = 2**22  # integers that the definition holds in float64 at a time


@dataclass(frozen=True)
class Matrix:
    """A matrix (outs, ins) in integers, laid out as the kernel reads it: blocks of OUTS outputs, filled up with zeros.

    words: int32 (blocks, words, OUTS): in each, four inputs of an output in 8 bits, or eight in 4. groups: uint8
    (blocks, groups, OUTS / 2): in each, the places in SCALES of two outputs' s; none of 8 bits. totals int32 and scale
    float32, (blocks * OUTS,): the sum of an output's integers, and its scale.
    """

    bits: int
    shape: tuple[int, int]
    words: Tensor
    groups: Tensor
    totals: Tensor
    scale: Tensor

    @staticmethod
    def of_integers(integers: Tensor, scale: Tensor) -> "Matrix":
        """8 bits: integers int8 (outs, ins) in -127..127, scale float32 (outs,)."""
        shape = _shape_of(integers, scale, torch.int8)
        filled = F.pad(integers, (0, -shape[1] % 4, 0, -shape[0] % OUTS))
        none = torch.empty(0, 0, OUTS // 2, dtype=torch.uint8, device=integers.device)
        return Matrix(8, shape, _in_blocks(filled.view(torch.uint8)), none, *_of_outputs(filled, scale))

    @staticmethod
    def of_codes(codes: Tensor, groups: Tensor, scale: Tensor) -> "Matrix":
        """4 bits: codes uint8 (outs, ins) in 0..15, groups uint8 (outs, ceil(ins / GROUP)) places in SCALES, scale
        float32 (outs,)."""
        shape = _shape_of(codes, scale, torch.uint8)
        outs, ins = shape
        expect(groups, "groups", (outs, -(-ins // GROUP)), torch.uint8)
        codes = F.pad(codes, (0, -ins % GROUP, 0, -outs % OUTS), value=8)
        groups = F.pad(groups, (0, 0, 0, -outs % OUTS))
        low, high = codes.view(len(codes), -1, 2, 4).unbind(2)
        first, second = groups.view(-1, 2, OUTS // 2, groups.shape[1]).transpose(2, 3).unbind(1)
        integers = _expanded(codes, groups)
        pairs = (first | second << 4).contiguous()
        return Matrix(4, shape, _in_blocks((low | high << 4).flatten(1)), pairs, *_of_outputs(integers, scale))

    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes and groups that `of_codes` was given."""
        outs, ins = self.shape
        packed = _in_rows(self.words)
        codes = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
        groups = torch.stack((self.groups & 15, self.groups >> 4), dim=1).transpose(2, 3).flatten(0, 2)
        return codes[:outs, :ins].contiguous(), groups[:outs].contiguous()

    def integers(self) -> Tensor:
        """int8 (outs, ins)."""
        outs, ins = self.shape
        if self.bits == 4:
            return _expanded(*self.codes())
        return _in_rows(self.words).view(torch.int8).flatten(1)[:outs, :ins].contiguous()

    def dense(self) -> Tensor:
        """The matrix that it stands for, float32."""
        return self.integers() * self.scale[: self.shape[0], None]

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        own = {"words": self.words, "totals": self.totals, "scale": self.scale}
        return own | ({"groups": self.groups} if self.bits == 4 else {})

    @staticmethod
    def shapes(bits: int, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each of the tensors of a matrix (outs, ins)."""
        outs, ins = shape
        blocks = -(-outs // OUTS)
        words = round_up(ins, 4) // 4 if bits == 8 else round_up(ins, GROUP) // 8
        of_outputs = (blocks * OUTS,)
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "words": ((blocks, words, OUTS), torch.int32),
            "totals": (of_outputs, torch.int32),
            "scale": (of_outputs, torch.float32),
        }
        return found | ({"groups": ((blocks, words * 8 // GROUP, OUTS // 2), torch.uint8)} if bits == 4 else {})

    @staticmethod
    def of_tensors(bits: int, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> "Matrix":
        """The matrix again. Raises: ShapeError naming the tensor that is not as `shapes` says."""
        for name, (expected, dtype) in Matrix.shapes(bits, shape).items():
            expect(tensors[name], name, expected, dtype)
        groups = tensors.get("groups", torch.empty(0, 0, OUTS // 2, dtype=torch.uint8))
        return Matrix(bits, shape, tensors["words"], groups, tensors["totals"], tensors["scale"])

    @property
    def padded_inputs(self) -> int:
        return round_up(self.shape[1], 4 if self.bits == 8 else GROUP)

    @cached_property
    def arrays(self) -> tuple[Any, ...]:
        """What the kernel takes of it."""
        words = self.words.view(-1).view(torch.uint32).numpy()
        return words, self.groups.flatten(0, 1).numpy(), self.totals.numpy(), self.scale.numpy()


def quantized_linear(x: Tensor, matrix: Matrix, bits: int = 8, dtype: torch.dtype | None = None) -> Tensor:
    """x (rows, ins) float32 or bfloat16 -> (rows, outs) in dtype, x's own where None. bits: 8 or 16, of a row's codes.

    A row that holds no number, or infinity, gives no numbers. Raises: ShapeError.
    """
    expect(x, "x", (len(x), matrix.shape[1]))
    if bits not in LEVELS:
        raise ShapeError(f"bits: must be {' or '.join(map(str, LEVELS))}; got {bits}")
    if wants_gradient(x):
        raise ShapeError("x: must not want a gradient, which a quantised matrix does not give; multiply by a plain one")
    dtype = dtype or x.dtype
    if not runs(x, matrix.scale):
        return quantized_linear_torch(x, matrix, bits, dtype)
    rows, planes = len(x), bits // 8
    codes = np.empty((rows, planes, matrix.padded_inputs), np.uint8)
    x_scale = np.empty(rows, np.float32)
    lines = rows * planes
    groups = matrix.padded_inputs // GROUP if matrix.bits == 4 and lines <= jit.SMALL else 0
    eights = np.empty((lines, groups), np.int32)
    jit.round_rows(rows, array(x.contiguous()), f(LEVELS[bits]), codes, x_scale, eights)
    out = torch.empty(rows, matrix.shape[0], dtype=dtype)
    words = codes.reshape(lines, matrix.padded_inputs).view("uint32")
    jit.rows_times(len(matrix.words), words, x_scale, eights, *matrix.arrays, array(out))
    return out


def quantized_linear_torch(x: Tensor, matrix: Matrix, bits: int, dtype: torch.dtype) -> Tensor:
    """The same in torch: where there is no kernel, and beside the kernel in tests. float64 holds the sums exactly."""
    codes, x_scale = rounded_rows(x, bits)
    at_once = max(1, AT_ONCE // matrix.shape[1])
    sums = [codes.double() @ some.double().T for some in matrix.integers().split(at_once)]
    return (torch.cat(sums, 1).float() * x_scale[:, None] * matrix.scale[: matrix.shape[0]]).to(dtype)


def rounded_rows(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """x (rows, ins) -> codes (rows, ins) int32 and x_scale (rows,) float32."""
    x = x.float()
    top, levels = x.abs().amax(1), x.new_tensor(LEVELS[bits])  # a plain number would be multiplied by a reciprocal
    nothing = top < LEAST
    factor = torch.where(nothing, 0, levels / top)
    return (x * factor[:, None]).round().nan_to_num().int(), torch.where(nothing, 0, top / levels)


def _shape_of(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    outs, ins = numbers.shape
    expect(numbers, "integers", (outs, ins), dtype)
    expect(scale, "scale", (outs,), torch.float32)
    if not 0 < ins <= MOST_INPUTS:
        raise ShapeError(f"integers: must have 1 to {MOST_INPUTS:,} inputs, for their sums to be exact; got {ins:,}")
    return outs, ins


def _of_outputs(integers: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """totals and scale, filled up."""
    return integers.sum(1, dtype=torch.int32), F.pad(scale, (0, len(integers) - len(scale)))


def _expanded(codes: Tensor, groups: Tensor) -> Tensor:
    """codes and groups as in `of_codes` -> int8 (outs, ins)."""
    times = torch.tensor(SCALES, dtype=torch.int8, device=groups.device)[groups.int()].repeat_interleave(GROUP, 1)[
        :, : codes.shape[1]
    ]
    return (codes.to(torch.int8) - 8) * times


def _in_blocks(rows: Tensor) -> Tensor:
    """uint8 (outs, bytes) -> int32 (blocks, words, OUTS)."""
    words = rows.view(-1, OUTS, rows.shape[1] // 4, 4).transpose(1, 2).contiguous()
    return words.view(torch.int32).squeeze(-1)


def _in_rows(words: Tensor) -> Tensor:
    """int32 (blocks, words, OUTS) -> uint8 (outs, words, 4)."""
    blocks, count, outs = words.shape
    return words.view(torch.uint8).view(blocks, count, outs, 4).transpose(1, 2).reshape(blocks * outs, count, 4)
