"""Letters as in ops/attention.py."""

import math

import pytest
import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.grid import BLOCK
from nemotron_h.ops import attention
from nemotron_h.ops.attention import attention_definition, attention_paged, attention_whole, keep_rows, rotate
from nemotron_h.ops.jit.compiler import runs
from nemotron_h.ops.segments import Segments
from tests.compare import assert_near, double, seeded
from tests.kernels import needs_kernels

LENGTHS = [1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 307, 1000]
F, KV, D = 6, 2, 16
# float32: an exp and a sum over the keys. bfloat16: eight bits of the output
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-6}


def random(length: int, seed: int, dtype: torch.dtype = torch.float32, heads: int = F) -> tuple[Tensor, Tensor, Tensor]:
    """q (l, f, d), k and v (l, kv, d) of one sequence."""
    generator = seeded(seed)
    return (
        torch.randn(length, heads, D, generator=generator).to(dtype),
        torch.randn(length, KV, D, generator=generator).to(dtype),
        torch.randn(length, KV, D, generator=generator).to(dtype),
    )


def in_pages(sequences: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (l, kv, d) of each sequence in pages, last page first, and the table; NaN where nothing is."""
    counts = [-(-len(k) // BLOCK) for k, _ in sequences]
    first = sequences[0][0]
    keys = torch.full((sum(counts) + 1, first.shape[1], first.shape[2], BLOCK), torch.nan, dtype=first.dtype)
    values = torch.full((sum(counts) + 1, first.shape[1], BLOCK, first.shape[2]), torch.nan, dtype=first.dtype)
    table = torch.zeros(len(sequences), max(counts), dtype=torch.int64)
    page = sum(counts)
    for index, (k, v) in enumerate(sequences):
        for block, (some_k, some_v) in enumerate(zip(k.split(BLOCK), v.split(BLOCK), strict=True)):
            keys[page, :, :, : len(some_k)] = some_k.permute(1, 2, 0)
            values[page, :, : len(some_v)] = some_v.transpose(0, 1)
            table[index, block] = page
            page -= 1
    return keys, values, table


def by_pages(sequences: list[tuple[Tensor, Tensor, Tensor]], starts: list[int]) -> list[Tensor]:
    """Each sequence's queries from its start on, in one call."""
    segments = Segments(
        tuple(starts), tuple(len(q) - start for (q, _, _), start in zip(sequences, starts, strict=True))
    )
    flat = torch.cat([q[start:] for (q, _, _), start in zip(sequences, starts, strict=True)])
    q = torch.cat((flat, torch.ones(segments.rows - segments.tokens, *flat.shape[1:], dtype=flat.dtype)))
    keys, values, table = in_pages([(k, v) for _, k, v in sequences])
    if attention.runs is not runs:  # the torch form multiplies weights of zero too
        keys, values = keys.nan_to_num(), values.nan_to_num()
    out = attention_paged(q, keys, values, segments, table)
    assert out.dtype == q.dtype
    assert (out[segments.tokens :] == 0).all()
    return [out[begin : begin + length] for begin, length in zip(segments.begins, segments.lengths, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS)
def test_pages_and_whole_equal_the_definition(length: int, dtype: torch.dtype, form: str) -> None:
    q, k, v = random(length, seed=length, dtype=dtype)
    want = attention_definition(q.double(), k.double(), v.double())
    (got,) = by_pages([(q, k, v)], [0])
    assert_near(got, want, ROUNDING[dtype])
    segments = Segments((0,), (length,))
    padded = [torch.cat((t, t.new_ones(segments.rows - length, *t.shape[1:]))) for t in (q, k, v)]
    assert_near(attention_whole(*padded, segments)[:length], want, ROUNDING[dtype])


def test_the_last_queries_of_a_long_past(form: str) -> None:
    q, k, v = random(4096, seed=1)
    want = attention_definition(q[-300:].double(), k.double(), v.double(), start=3796)
    (got,) = by_pages([(q, k, v)], [3796])
    assert_near(got, want, ROUNDING[torch.float32])


@pytest.mark.parametrize("starts", [[0, 0, 0], [1, 255, 700], [256, 600, 0], [511, 512, 513]])
def test_ragged_segments_with_a_past_of_several_pages(starts: list[int], form: str) -> None:
    sequences = [random(start + new, seed=i) for i, (start, new) in enumerate(zip(starts, (1, 300, 64), strict=True))]
    for got, (q, k, v), start in zip(by_pages(sequences, starts), sequences, starts, strict=True):
        want = attention_definition(q[start:].double(), k.double(), v.double(), start=start)
        assert_near(got, want, ROUNDING[torch.float32])


@pytest.mark.parametrize("heads", [2, 6, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_alone_has_the_bits_of_the_whole(dtype: torch.dtype, heads: int, form: str) -> None:
    q, k, v = random(530, seed=2, dtype=dtype, heads=heads)
    (whole,) = by_pages([(q, k, v)], [0])
    for place in (0, 1, 2, 63, 64, 254, 255, 256, 257, 511, 512, 529):
        (alone,) = by_pages([(q[: place + 1], k[: place + 1], v[: place + 1])], [place])
        assert torch.equal(alone[0], whole[place]), place


@needs_kernels
@pytest.mark.parametrize("width", [8, 15, 24, 64, 80, 128])
@pytest.mark.parametrize("by_pairs", [False, True])
def test_bfloat16_by_pairs_and_without(*, by_pairs: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_pairs and not attention.ADDS_PAIRS:
        pytest.skip("this CPU does not add products of pairs")
    monkeypatch.setattr(attention, "ADDS_PAIRS", by_pairs)
    generator = seeded(width)
    q, k, v = (torch.randn(300, heads, width, generator=generator).bfloat16() for heads in (F, KV, KV))
    (whole,) = by_pages([(q, k, v)], [0])
    assert_near(whole, attention_definition(q.double(), k.double(), v.double()), ROUNDING[torch.bfloat16])
    for place in (0, 1, 62, 63, 64, 255, 256, 299):
        (alone,) = by_pages([(q[: place + 1], k[: place + 1], v[: place + 1])], [place])
        assert torch.equal(alone[0], whole[place]), place


@needs_kernels  # the torch form multiplies weights of zero too
@pytest.mark.parametrize("place", [0, 1, 254, 255, 299])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_with_the_queries_that_see_it(dtype: torch.dtype, place: int) -> None:
    q, k, v = random(300, seed=9, dtype=dtype)
    (want,) = by_pages([(q, k, v)], [0])
    for poisoned in (k, v):
        clean = poisoned[place].clone()
        poisoned[place] = torch.nan
        (got,) = by_pages([(q, k, v)], [0])
        assert torch.equal(got[:place], want[:place])
        assert got[place:].isnan().all()
        poisoned[place] = clean


def test_queries_may_lie_in_any_order() -> None:
    q, k, v = random(70, seed=10, dtype=torch.bfloat16)
    (want,) = by_pages([(q, k, v)], [0])
    turned = torch.empty(D, F, 72, dtype=torch.bfloat16).permute(2, 1, 0)
    turned[:70] = q
    segments = Segments((0,), (70,))
    keys, values, table = in_pages([(k.nan_to_num(), v)])
    out = attention_paged(turned, keys.nan_to_num(), values.nan_to_num(), segments, table)
    assert torch.equal(out[:70], want)


@pytest.mark.parametrize("place", [0, 1, 255, 256, 299])
def test_no_query_reads_a_later_key(place: int, form: str) -> None:
    q, k, v = random(300, seed=3)
    others = random(300, seed=4)
    changed = [t.clone() for t in (q, k, v)]
    for t, other in zip(changed, others, strict=True):
        t[place] = other[place] * 5
    segments = Segments((0,), (300,))
    for run in (lambda *t: by_pages([t], [0])[0], lambda *t: attention_whole(*t, segments)):
        before, after = run(q, k, v), run(*changed)
        assert torch.equal(before[:place], after[:place])
        assert not torch.equal(before[place], after[place])


@pytest.mark.parametrize("lengths", [(1,), (65,), (300,), (64, 64, 64), (60, 60), (1, 130, 7)])
def test_gradients_equal_the_definitions(lengths: tuple[int, ...]) -> None:
    segments = Segments((0,) * len(lengths), lengths)
    leaves = [t.requires_grad_() for t in random(segments.rows, seed=5)]
    factor = torch.randn(segments.tokens, F, D, generator=seeded(6))
    out = attention_whole(*leaves, segments)
    assert len(out) == segments.rows
    got = torch.autograd.grad((out[: segments.tokens] * factor).sum(), leaves)
    exact = [double(t) for t in leaves]
    parts = [
        attention_definition(*(t[begin : begin + length] for t in exact))
        for begin, length in zip(segments.begins, lengths, strict=True)
    ]
    want = torch.autograd.grad((torch.cat(parts) * factor).sum(), exact)
    for name, value, exact_value in zip("qkv", got, want, strict=True):
        # a query of one key has no gradient: what is left there is rounding beside the others
        scale = max(exact_value.abs().max().item(), 1.0)
        assert (value - exact_value).abs().max() <= 5e-6 * scale, name
        assert (value[segments.tokens :] == 0).all()


def test_scores_too_large_for_exp(form: str) -> None:
    q, k, v = random(300, seed=7)
    want = attention_definition(q.double() * 100, k.double() * 10, v.double())
    (got,) = by_pages([(q * 100, k * 10, v)], [0])
    # scores reach 10,000: their own rounding is an exponent's error
    assert_near(got, want, 2e-3)


def test_pages_refuse_a_gradient_which_they_do_not_have() -> None:
    segments = Segments((0,), (5,))
    q = torch.zeros(segments.rows, F, D, requires_grad=True)
    _, k, v = random(5, seed=8)
    with pytest.raises(ShapeError, match=r"^q: must not want a gradient"):
        attention_paged(q, *in_pages([(k, v)])[:2], segments, torch.zeros(1, 1, dtype=torch.int64))


def test_pages_of_another_dtype_or_size_are_refused() -> None:
    q, k, v = random(8, seed=8)
    keys, values, table = in_pages([(k, v)])
    segments = Segments((0,), (8,))
    for wrong, named in (
        ((keys.bfloat16(), values), "keys: must be torch.float32"),
        ((keys, values.transpose(2, 3)), "values: must have shape"),
        ((keys.transpose(2, 3), values), "keys: must have shape"),
        ((keys[:, :1].expand(-1, 4, -1, -1), values), "keys: must have heads that divide the 6 of q; got 4"),
    ):
        with pytest.raises(ShapeError, match=f"^{named}"):
            attention_paged(q, *wrong, segments, table)


@pytest.mark.slow
def test_pages_beyond_two_thousand_million_elements() -> None:
    """A pool whose last page lies past 2^31 elements; of its 8.6 GB only the pages in use are ever touched."""
    q, k, v = random(300, seed=11, dtype=torch.bfloat16)
    (want,) = by_pages([(q, k, v)], [0])
    pages = 2**31 // (KV * D * BLOCK) + 3
    keys = torch.zeros(pages, KV, D, BLOCK, dtype=torch.bfloat16)
    values = torch.zeros(pages, KV, BLOCK, D, dtype=torch.bfloat16)
    small_keys, small_values, _ = in_pages([(k, v)])
    table = torch.tensor([[pages - 1, pages - 2]])
    for page, own in zip(table[0].tolist(), (2, 1), strict=True):
        keys[page], values[page] = small_keys[own], small_values[own]
    out = attention_paged(q, keys, values, Segments((0,), (300,)), table)
    assert torch.equal(out, want)


@pytest.mark.parametrize(("width", "base"), [(16, 10_000.0), (8, 500_000.0), (2, 100.0)])
def test_rotation_equals_its_definition(width: int, base: float) -> None:
    """Channel pairs (i, i + width / 2) as complex numbers, turned by position * base^(-2 i / width)."""
    x = torch.randn(7, F, D, generator=seeded(9))
    positions = torch.tensor([0, 1, 2, 63, 1000, 131_071, 2**20])
    got = rotate(x, positions, base, width)
    half = width // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:width].double())
    speeds = torch.tensor([base ** (-2 * i / width) for i in range(half)], dtype=torch.float64)
    turned = pairs * torch.exp(1j * positions[:, None, None] * speeds)
    want = torch.cat((turned.real, turned.imag, x[..., width:].double()), dim=-1)
    assert_near(got, want, 1e-6)
    assert torch.equal(got[0], x[0])
    assert torch.equal(got[..., width:], x[..., width:])
    assert rotate(x.bfloat16(), positions, base, width).dtype == torch.bfloat16


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k, _ = random(1, seed=10)
    scores = []
    for first in (0, 5, 1000, 100_000):
        at = torch.tensor([first + 37])
        scores.append((rotate(q, at, 1e4, D)[0, 0] @ rotate(k, torch.tensor([first]), 1e4, D)[0, 0]).item())
    assert max(scores) - min(scores) < 1e-5 * math.sqrt(D)


@pytest.mark.usefixtures("form")
def test_a_table_that_leads_out_of_the_pool_is_refused() -> None:
    q, k, v = random(300, seed=12)
    keys, values, table = in_pages([(k, v)])
    segments = Segments((296,), (4,))
    for wrong, said in (
        (table[:, :1], r"^table: must have shape \(1, 2\); got \(1, 1\)"),
        (table[:0], r"^table: must have shape \(1, 2\); got \(0, 2\)"),
        (table.int(), r"^table: must be torch.int64"),
        (table + 2, r"^table: must hold pages of 0..2; got 3..4"),
        (table - 2, r"^table: must hold pages of 0..2; got -1..0"),
    ):
        with pytest.raises(ShapeError, match=said):
            attention_paged(q[296:], keys, values, segments, wrong)


def kept_in_integers(sequences: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in int8, as rows are pushed; codes of -1 and scales of NaN where nothing is."""
    lengths = tuple(len(k) for k, _ in sequences)
    segments = Segments((0,) * len(lengths), lengths)
    flat = [
        torch.cat((*some, some[0].new_ones(segments.rows - segments.tokens, KV, D)))
        for some in zip(*sequences, strict=True)
    ]
    plain_keys, plain_values, table = in_pages(sequences)
    keys, values = (torch.full_like(t, -1, dtype=torch.int8) for t in (plain_keys, plain_values))
    scales = torch.full((len(keys), 2, KV, BLOCK), torch.nan)
    offsets, owners = segments.offsets, segments.owners
    pages = torch.where(offsets >= 0, table[owners, offsets.clamp(min=0) // BLOCK], -1)
    keep_rows(*flat, pages, offsets.clamp(min=0) % BLOCK, keys, values, scales)
    return keys, values, scales, table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("starts", [[0, 0, 0], [1, 255, 700], [256, 600, 0]])
def test_keys_and_values_in_int8(starts: list[int], dtype: torch.dtype, form: str) -> None:
    """What is computed is the definition of the rounded ones; and those are within half a step of what they were."""
    sequences = [
        random(start + new, seed=i, dtype=dtype)
        for i, (start, new) in enumerate(zip(starts, (1, 300, 64), strict=True))
    ]
    keys, values, scales, table = kept_in_integers([(k, v) for _, k, v in sequences])
    segments = Segments(
        tuple(starts), tuple(len(q) - start for (q, _, _), start in zip(sequences, starts, strict=True))
    )
    flat = torch.cat([q[start:] for (q, _, _), start in zip(sequences, starts, strict=True)])
    q = torch.cat((flat, flat.new_ones(segments.rows - segments.tokens, F, D)))
    out = attention_paged(q, keys, values, segments, table, scales)
    assert out.dtype == dtype
    for index, ((own, k, v), start) in enumerate(zip(sequences, starts, strict=True)):
        pages = table[index, : -(-len(k) // BLOCK)]
        exact_k = (
            (keys[pages].double() * scales[pages, 0, :, None].double()).permute(0, 3, 1, 2).flatten(0, 1)[: len(k)]
        )
        exact_v = (
            (values[pages].double() * scales[pages, 1, ..., None].double()).permute(0, 2, 1, 3).flatten(0, 1)[: len(v)]
        )
        for exact, plain in ((exact_k, k), (exact_v, v)):
            step = plain.double().abs().amax(-1, keepdim=True) / 127
            assert ((exact - plain.double()).abs() <= 0.5001 * step).all()
        begin = segments.begins[index]
        got = out[begin : begin + segments.lengths[index]]
        assert_near(got, attention_definition(own[start:].double(), exact_k, exact_v, start=start), ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_alone_has_the_bits_of_the_whole_in_int8(dtype: torch.dtype, form: str) -> None:
    q, k, v = random(530, seed=2, dtype=dtype)
    keys, values, scales, table = kept_in_integers([(k, v)])
    padded = torch.cat((q, q.new_ones(2, F, D)))
    whole = attention_paged(padded, keys, values, Segments((0,), (530,)), table, scales)
    for place in (0, 1, 2, 63, 64, 254, 255, 256, 257, 511, 512, 529):
        alone = attention_paged(
            q[place : place + 1].repeat(4, 1, 1), keys, values, Segments((place,), (1,)), table, scales
        )
        assert torch.equal(alone[0], whole[place]), place


def test_rows_of_zeros_and_of_large_numbers_in_int8(form: str) -> None:
    _, k, v = random(5, seed=3)
    k[1], v[1], k[2], v[2] = 0, 0, k[2] * 1e30, v[2] * 1e-30
    k[3] = k[3] / k[3].abs().amax(-1, keepdim=True) * 190 * 2.0**-149  # fewer steps of a float than codes
    keys, _, scales, table = kept_in_integers([(k, v)])
    page = int(table[0, 0])
    assert (keys[page, :, :, 1] == 0).all()
    assert (scales[page, :, :, 1] == 0).all()
    assert keys[page, :, :, :5].abs().amax() == 127
    assert (keys[page, :, :, 3].abs().amax(-1) == 127).all()
    want = k[2].abs().amax(-1) / 127
    assert torch.equal(scales[page, 0, :, 2], want)
    exact = keys[page].double() * scales[page, 0, :, None].double()
    assert_near(exact[..., 2], k[2].double(), 1 / 250)
