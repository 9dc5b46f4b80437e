import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.ops import linear as room
from nemotron_h.ops.jit import floats
from nemotron_h.ops.jit.blocks import STREAMS
from nemotron_h.ops.linear import AT_ONCE, Blocks, FewRows, few_rows, in_blocks, linear, packed
from tests.compare import assert_near, seeded
from tests.kernels import needs_kernels

# shapes whose plain product gives a row other bits at another place, on some number of threads
SHAPES = [(40, 77), (40, 4), (8, 134), (40, 110), (68, 10), (8, 25), (104, 14), (2, 113)]


def plain(weight: Tensor) -> Tensor:
    return weight


@pytest.mark.parametrize("laid_out", [plain, packed])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "into"), [*SHAPES, (40, 80), (97, 64), (40, 2048)])
def test_a_rows_bits_depend_on_that_row_alone(
    out: int,
    into: int,
    dtype: torch.dtype,
    count: int,
    laid_out: Callable[[Tensor], Tensor],
    threads: Callable[[int], None],
) -> None:
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no products of bfloat16; what is done instead an engine tries at its start")
    threads(count)
    weight, x = (torch.randn(rows, into, generator=seeded(0)).to(dtype) for rows in (out, 300))
    weight = laid_out(weight)
    whole = linear(x, weight)
    for rows, first in ((16, 1), (32, 3), (96, 5), (256, 7), (16, 100)):  # machines differ in what fewer rows give
        assert torch.equal(linear(x[first : first + rows].clone(), weight), whole[first : first + rows])


def test_the_value_is_the_product_and_the_weight_is_cast() -> None:
    weight, x = torch.randn(5, 7), torch.randn(4, 7)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
    assert linear(x.bfloat16(), weight).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_is_the_same_matrix_and_gives_the_same_product(dtype: torch.dtype) -> None:
    weight, x = (torch.randn(rows, 1024, generator=seeded(rows)).to(dtype) for rows in (96, 40))
    opaque = packed(weight)
    if not opaque.is_mkldnn:
        pytest.skip("this CPU packs no such matrices")
    assert opaque.shape == weight.shape
    assert opaque.dtype == weight.dtype
    assert torch.equal(opaque.to_dense(), weight)
    assert packed(opaque) is opaque
    if dtype == torch.bfloat16:
        assert torch.equal(linear(x, opaque), linear(x, weight))
    assert_near(linear(x, opaque), x.double() @ weight.double().T, 2**-8 if dtype == torch.bfloat16 else 1e-6)


def test_what_cannot_be_packed_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = torch.randn(8, 77)
    assert packed(odd) is odd
    meta = torch.empty(8, 16, device="meta")
    assert packed(meta) is meta

    def refuse(*_: object) -> Tensor:
        raise RuntimeError("bf16 path needs the cpu support avx512bw\nand more")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    room.said_once.cache_clear()
    weight = torch.randn(8, 16)
    with pytest.warns(
        UserWarning, match=r"^matrices cannot be packed here \(bf16 path needs the cpu support avx512bw\)"
    ):
        assert packed(weight) is weight
    assert packed(weight) is weight  # said once


# inputs under, at and over the lengths of a chain; outputs that fill whole blocks and that do not
FEW = [(40, 48), (192, 4096), (512, 200), (640, 520), (1024, 256), (1040, 96), (2048, 1000), (4104, 64)]


@pytest.mark.parametrize(("into", "out"), FEW)
def test_few_rows_have_the_bits_of_many(into: int, out: int) -> None:
    weight = packed((torch.randn(out, into, generator=seeded(out)) / into**0.5).bfloat16())
    read = few_rows(weight)
    if read is None:
        pytest.skip("this CPU has no such instruction")
    x = torch.randn(40, into, generator=seeded(into)).bfloat16()
    want = linear(x, weight)
    for rows in (1, 2, 3, 4, 5, 8, 12, 13, 16, 31, 33):
        assert torch.equal(read(x[7 : 7 + rows]), want[7 : 7 + rows]), rows
    other = packed(torch.randn(out, into, generator=seeded(1)).bfloat16())
    again = few_rows(other, read.depth)
    assert again is not None
    assert torch.equal(again(x[:4]), linear(x[:4], other))


def test_where_no_order_of_sums_has_onednns_bits_onednn_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(torch.randn(128, 2048, generator=seeded(0)).bfloat16())
    read = few_rows(weight)
    if read is None:
        pytest.skip("this CPU has no such instruction")
    assert read.depth == 1024
    monkeypatch.setattr(room, "DEPTHS", (512,))  # and one chain of all: neither is oneDNN's
    assert few_rows(weight) is None
    monkeypatch.setattr(room, "DEPTHS", (512, 1024))
    assert few_rows(weight) is not None
    x = torch.randn(2**11, 2048, generator=seeded(1)).bfloat16()
    assert not torch.equal(FewRows(weight, read.words, 512)(x), linear(x, weight))


def test_another_layout_or_dtype_is_left_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert few_rows(torch.randn(64, 64).bfloat16()) is None
    assert few_rows(packed(torch.randn(64, 64))) is None
    monkeypatch.setattr(torch.ops.mkldnn, "_nbytes", lambda weight: 100)
    assert few_rows(packed(torch.randn(64, 64).bfloat16())) is None
    monkeypatch.setattr(room.jit, "RUNS", False)
    assert few_rows(packed(torch.randn(64, 64).bfloat16())) is None


def test_what_a_packed_matrix_cannot_take_is_refused() -> None:
    weight = packed(torch.randn(64, 256, generator=seeded(0)).bfloat16())
    if not weight.is_mkldnn:
        pytest.skip("this CPU packs no such matrices")
    read = few_rows(weight)
    ways = [lambda x: linear(x, weight), *([read] if read is not None else [])]
    for way in ways:
        for x, said in (
            (torch.zeros(4, 256), r"^x: must be torch.bfloat16; got torch.float32"),
            (torch.zeros(4, 128).bfloat16(), r"^x: must have shape \(4, 256\); got \(4, 128\)"),
            (torch.zeros(4, 256).bfloat16().requires_grad_(), r"^x: must not want a gradient"),
        ):
            with pytest.raises(ShapeError, match=said):
                way(x)


# (out, into): odd ones, fewer inputs than parts, whole pieces and a few words more
BLOCKS = [(64, 64), (100, 77), (200, 8), (130, 1040), (64, 3), (1, 258), (640, 2050)]
COUNTS = (*range(1, 7), 8, *range(11, 25), 64)  # rows: each way to go through them


def drawn(out: int, into: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of few bits each, so that float32 holds their products."""
    weight, x = (torch.randn(count, into, generator=seeded(count)).bfloat16() for count in (out, rows))
    return weight.to(dtype), x.to(dtype)


def chain(x: Tensor, weight: Tensor) -> Tensor:
    """The sum in the order that `jit/floats.py` states; products being exact, each step is rounded once."""
    inputs = 4 // x.itemsize
    totals = torch.zeros(len(x), len(weight))
    for first in range(0, x.shape[1], floats.CHAIN):
        width = min(floats.CHAIN, x.shape[1] - first)
        words = -(-width // inputs)
        part = words // STREAMS
        order = [stream * part + k for k in range(part) for stream in range(STREAMS)] + [*range(part * STREAMS, words)]
        sums = torch.zeros_like(totals)
        for i in (word * inputs + k for word in order for k in range(inputs)):
            if i < width:
                sums += x[:, first + i, None].float() * weight[:, first + i].float()
        totals += sums
    return totals.to(x.dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "into"), BLOCKS)
def test_a_matrix_in_blocks_sums_in_one_order_for_any_rows(out: int, into: int, dtype: torch.dtype) -> None:
    weight, x = drawn(out, into, 90, dtype)
    blocks = Blocks.of(weight)
    assert torch.equal(blocks.plain(), weight)
    whole = blocks(x)
    assert torch.equal(whole, chain(x, weight))
    for rows in COUNTS:
        assert torch.equal(blocks(x[7 : 7 + rows].clone()), whole[7 : 7 + rows]), rows
    turned = x.T.contiguous().T  # its rows lie apart
    assert torch.equal(blocks(turned), whole)


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_rows_of_a_matrix_in_blocks_are_cut_and_shared_without_a_trace(
    count: int, threads: Callable[[int], None]
) -> None:
    weight, x = drawn(300, 130, AT_ONCE + 70, torch.bfloat16)
    blocks = Blocks.of(weight)
    want = chain(x, weight)
    threads(count)
    assert torch.equal(blocks(x), want)
    assert torch.equal(blocks(x[:1]), want[:1])


@needs_kernels
def test_what_is_no_number_stays_in_its_row() -> None:
    weight, x = drawn(70, 130, 20, torch.bfloat16)
    want = Blocks.of(weight)(x)
    x[3, 5], x[4, 100] = torch.inf, torch.nan
    for rows in (5, 20):
        got = Blocks.of(weight)(x[:rows])
        assert torch.equal(got[:3], want[:3])
        assert torch.equal(got[5:], want[5:rows])
        assert not got[3:5].isfinite().any()
    assert Blocks.of(weight)(x[:0]).shape == (0, 70)


@needs_kernels
def test_a_matrix_is_in_blocks_where_that_is_the_way_to_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = torch.randn(64, 64), torch.randn(64, 64).bfloat16()
    monkeypatch.setattr(room.jit, "PRODUCTS", True)
    assert in_blocks(wide) is not None
    assert in_blocks(narrow) is None
    monkeypatch.setattr(room.jit, "PRODUCTS", False)
    assert in_blocks(narrow) is not None
    assert in_blocks(torch.empty(64, 64, device="meta")) is None
    blocks = Blocks.of(narrow)
    for x, said in (
        (torch.zeros(4, 64), r"^x: must be torch.bfloat16; got torch.float32"),
        (torch.zeros(4, 32).bfloat16(), r"^x: must have shape \(4, 64\); got \(4, 32\)"),
        (torch.zeros(4, 64).bfloat16().requires_grad_(), r"^x: must not want a gradient"),
    ):
        with pytest.raises(ShapeError, match=said):
            blocks(x)
    monkeypatch.setattr(room, "runs", lambda *tensors: False)
    assert in_blocks(wide) is None


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "lanes"),
    [({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+fma,+avx2"}, 8), ({"NUMBA_CPU_NAME": "generic"}, 8)],
)
def test_a_matrix_in_blocks_has_the_same_bits_with_other_instructions(
    told: dict[str, str], lanes: int, tmp_path: Path
) -> None:
    program = """
import sys, torch
from tests.ops.test_linear import BLOCKS, COUNTS, drawn
from nemotron_h.ops.jit import floats
from nemotron_h.ops.linear import Blocks
out = [floats.VECTOR]
for dtype in (torch.float32, torch.bfloat16):
    for outs, into in BLOCKS:
        for rows in COUNTS:
            weight, x = drawn(outs, into, rows, dtype)
            out.append(Blocks.of(weight)(x))
torch.save(out, sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "there")],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")} | told,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    there = torch.load(tmp_path / "there")
    assert there[0] == lanes
    assert floats.VECTOR in (8, 16)
    here = (
        Blocks.of(weight)(x)
        for dtype in (torch.float32, torch.bfloat16)
        for out, into in BLOCKS
        for weight, x in (drawn(out, into, rows, dtype) for rows in COUNTS)
    )
    assert all(torch.equal(a, b) for a, b in zip(here, there[1:], strict=True))


@needs_kernels
@pytest.mark.parametrize(
    "told", [{"NUMBA_CPU_NAME": "generic"}, {"NUMBA_CPU_FEATURES": "+fma,+avx2"}, {"NUMBA_ENABLE_AVX": "0"}]
)
def test_where_kernels_are_compiled_for_another_cpu_onednn_does_it_all(told: dict[str, str]) -> None:
    program = (
        "import torch; from nemotron_h.ops.linear import few_rows, packed; "
        "print(few_rows(packed(torch.randn(64, 256).bfloat16())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ | told
    )
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr[-500:]
