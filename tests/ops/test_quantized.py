import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.ops import quantized as room
from nemotron_h.ops.jit.compiler import FEATURES
from nemotron_h.ops.jit.nibbles import GROUP, SCALES
from nemotron_h.ops.quantized import MOST_INPUTS, Matrix, quantized_linear, quantized_linear_torch, rounded_rows
from tests.compare import seeded
from tests.kernels import needs_kernels

# outputs and inputs that fill whole blocks, groups and words, and that do not
SHAPES = [(64, 32), (1, 1), (3, 5), (65, 33), (130, 1000), (256, 1024), (70, 2100)]
ROWS = (*range(1, 9), 11, 12, 13, 16, *range(19, 25))


def drawn(bits: int, outs: int, ins: int, seed: int = 0) -> tuple[Matrix, Tensor]:
    """A matrix, and the integers that it was made of."""
    generator = seeded(seed)
    scale = torch.rand(outs, generator=generator) / 100
    if bits == 8:
        integers = torch.randint(-127, 128, (outs, ins), dtype=torch.int8, generator=generator)
        return Matrix.of_integers(integers, scale), integers
    codes = torch.randint(0, 16, (outs, ins), dtype=torch.uint8, generator=generator)
    groups = torch.randint(0, 16, (outs, -(-ins // GROUP)), dtype=torch.uint8, generator=generator)
    return Matrix.of_codes(codes, groups, scale), expanded(codes, groups)


def expanded(codes: Tensor, groups: Tensor) -> Tensor:
    """(code - 8) s, one by one."""
    pairs = [
        [(int(code) - 8) * SCALES[int(groups[o, i // GROUP])] for i, code in enumerate(row)]
        for o, row in enumerate(codes)
    ]
    return torch.tensor(pairs, dtype=torch.int8)


def test_scales_are_small_floats() -> None:
    for place, scale in enumerate(SCALES):
        sign, exponent, mantissa = place >> 3, place >> 2 & 1, place & 3
        assert scale == (-1) ** sign * (4 + mantissa) * 2**exponent
    assert max(map(abs, SCALES)) * 8 <= 127


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("row_bits", [8, 16])
def test_no_rows(bits: int, row_bits: int) -> None:
    matrix, _ = drawn(bits, 65, 33)
    for product in (quantized_linear(torch.empty(0, 33), matrix, row_bits), matrix_product(matrix, row_bits)):
        assert product.shape == (0, 65)


def matrix_product(matrix: Matrix, row_bits: int) -> Tensor:
    return quantized_linear_torch(torch.empty(0, 33), matrix, row_bits, torch.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("outs", "ins"), SHAPES)
def test_the_layout_holds_the_matrix(bits: int, outs: int, ins: int) -> None:
    matrix, integers = drawn(bits, outs, ins)
    assert torch.equal(matrix.integers(), integers)
    assert torch.equal(matrix.dense(), integers * matrix.scale[:outs, None])
    assert torch.equal(matrix.totals[:outs], integers.sum(1, dtype=torch.int32))
    assert not matrix.totals[outs:].any()
    if bits == 4:
        again = Matrix.of_codes(*matrix.codes(), matrix.scale[:outs])
        assert torch.equal(again.words, matrix.words)
        assert torch.equal(again.groups, matrix.groups)
        stored = matrix.words.nbytes + matrix.groups.nbytes
        if outs % 64 == 0 and ins % GROUP == 0:
            assert stored * 8 == 4.25 * outs * ins


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("outs", "ins"), SHAPES)
def test_the_kernel_has_the_bits_of_the_definition(bits: int, outs: int, ins: int) -> None:
    matrix, _ = drawn(bits, outs, ins)
    for rows in ROWS:
        x = torch.randn(rows, ins, generator=seeded(rows))
        for some in (x, x.bfloat16()):
            for row_bits in (8, 16):
                for dtype in (torch.float32, torch.bfloat16):
                    got = quantized_linear(some, matrix, row_bits, dtype)
                    assert torch.equal(got, quantized_linear_torch(some, matrix, row_bits, dtype)), (rows, row_bits)
        assert quantized_linear(x.bfloat16(), matrix).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_the_product_of_the_rounded_rows_and_the_matrix(bits: int) -> None:
    matrix, integers = drawn(bits, 96, 640)
    x = torch.randn(9, 640, generator=seeded(1))
    for row_bits in (8, 16):
        codes, scale = rounded_rows(x, row_bits)
        rows = codes.double() * scale.double()[:, None]
        want = rows @ (integers.double() * matrix.scale[:96, None].double()).T
        torch.testing.assert_close(quantized_linear(x, matrix, row_bits).double(), want, rtol=1e-6, atol=1e-6)
        assert (rows - x).abs().max() <= scale.max() * 0.5001


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_rows_bits_depend_on_that_row_alone(bits: int, count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    matrix, _ = drawn(bits, 200, 520)
    x = torch.randn(300, 520, generator=seeded(2)).bfloat16()
    for row_bits in (8, 16):
        whole = quantized_linear(x, matrix, row_bits)
        for rows, first in ((1, 17), (3, 5), (5, 100), (64, 7), (255, 40)):
            assert torch.equal(quantized_linear(x[first : first + rows], matrix, row_bits), whole[first : first + rows])


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_nothing_huge_ones_and_no_numbers(bits: int) -> None:
    matrix, _ = drawn(bits, 70, 100)
    x = torch.randn(8, 100, generator=seeded(3))
    x[1] = 0
    x[2] *= 1e-36
    x[3] *= 1e30
    x[4, 7] = float("nan")
    x[5, 7] = float("inf")
    x[6, 1:] = 0
    for row_bits in (8, 16):
        got = quantized_linear(x, matrix, row_bits)
        want = quantized_linear_torch(x, matrix, row_bits, torch.float32)
        for row in (0, 1, 2, 3, 6, 7):
            assert torch.equal(got[row], want[row])
        assert not got[1].any()
        assert not got[2].any()
        assert got[3].isfinite().all()
        assert torch.equal(got[6], quantized_linear(x[6:7], matrix, row_bits)[0])
        for broken in (got, want):
            assert broken[4].isnan().all()
            assert not broken[5].isfinite().any()


def test_the_largest_sums_are_exact() -> None:
    ins = MOST_INPUTS
    matrix = Matrix.of_integers(torch.full((3, ins), 127, dtype=torch.int8), torch.ones(3))
    for sign in (1, -1):
        x = torch.full((2, ins), float(sign))
        for row_bits, level in ((8, 127), (16, 32767)):
            assert torch.equal(
                quantized_linear(x, matrix, row_bits), quantized_linear_torch(x, matrix, row_bits, x.dtype)
            )
            near = quantized_linear(x, matrix, row_bits)[0, 0].item() / (sign * 127 * ins)
            assert near == pytest.approx(1, abs=1e-6), level


def test_what_cannot_be_is_refused() -> None:
    matrix, _ = drawn(8, 3, 8)
    for x, more, said in (
        (torch.zeros(2, 7), (), r"^x: must have shape \(2, 8\); got \(2, 7\)"),
        (torch.zeros(2, 8), (4,), r"^bits: must be 8 or 16; got 4"),
        (torch.zeros(2, 8).requires_grad_(), (), r"^x: must not want a gradient"),
    ):
        with pytest.raises(ShapeError, match=said):
            quantized_linear(x, matrix, *more)
    with pytest.raises(ShapeError, match=r"^integers: must have 1 to 65,280 inputs, for their sums to be exact; got"):
        Matrix.of_integers(torch.zeros(1, MOST_INPUTS + 1, dtype=torch.int8), torch.ones(1))
    with pytest.raises(ShapeError, match=r"^groups: must have shape \(2, 2\); got \(2, 1\)"):
        Matrix.of_codes(torch.zeros(2, 17, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8), torch.ones(2))
    with pytest.raises(ShapeError, match=r"^integers: must be torch.int8; got torch.uint8"):
        Matrix.of_integers(torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2))
    with pytest.raises(ShapeError, match=r"^scale: must have shape \(2,\); got \(3,\)"):
        Matrix.of_integers(torch.zeros(2, 8, dtype=torch.int8), torch.ones(3))


def test_without_kernels_the_definition_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, _ = drawn(4, 70, 100)
    x = torch.randn(5, 100, generator=seeded(4))
    want = quantized_linear(x, matrix)
    monkeypatch.setattr(room, "runs", lambda *tensors: False)
    assert torch.equal(quantized_linear(x, matrix), want)
    monkeypatch.setattr(room, "AT_ONCE", 250)
    assert torch.equal(quantized_linear(x, matrix), want)


AVX2 = "+fma,+avx2,+ssse3"
OTHERS = {  # environment, whether there is one instruction, sums of a vector
    "avx2": ({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2}, False, 8),
    "plain": ({"NUMBA_CPU_NAME": "generic"}, False, 8),
    "half": ({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": f"{AVX2},+avx512vl,+avx512vnni"}, True, 8),
}


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("instructions", OTHERS)
def test_other_instructions_have_the_same_bits(instructions: str, tmp_path: Path) -> None:
    program = """
import sys, torch
from tests.ops.test_quantized import SHAPES, drawn
from nemotron_h.ops.jit import quads
from nemotron_h.ops.quantized import quantized_linear
out = [bool(quads.ADDS_QUADS), quads.LANES]
for bits in (8, 4):
    for outs, ins in SHAPES:
        matrix, _ = drawn(bits, outs, ins)
        for rows in (1, 2, 3, 5, 9, 20):
            x = torch.randn(rows, ins, generator=torch.Generator().manual_seed(rows))
            out += [quantized_linear(x, matrix, row_bits) for row_bits in (8, 16)]
torch.save(out, sys.argv[1])
"""

    def results(name: str, told: dict[str, str]) -> list[Any]:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / name)],
            capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / f"{name}-cache")} | told,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        loaded: list[Any] = torch.load(tmp_path / name)
        return loaded

    told, one, lanes = OTHERS[instructions]
    if instructions == "half" and not (FEATURES.get("avx512vnni") and FEATURES.get("avx512vl")):
        pytest.skip("this CPU has no such instruction")
    here, there = results("here", {}), results("there", told)
    assert there[:2] == [one, lanes]
    assert all(torch.equal(a, b) for a, b in zip(here[2:], there[2:], strict=True))
