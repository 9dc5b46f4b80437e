"""Letters as in ops/steps.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.grid import CHUNK
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.steps import steps
from tests.compare import assert_near, double, seeded

H = 5
ANY = (0.0, math.inf)
ROUNDING = 3e-6  # float32: raw + bias, of up to 30, is an exponent; then an exp and a logarithm


def random(segments: Segments, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """raw, bias and A, with steps from nothing to 20."""
    generator = seeded(seed)
    raw = torch.randn(segments.rows, H, generator=generator) * 6
    return raw, torch.randn(H, generator=generator), -1 - 15 * torch.rand(H, generator=generator)


def defined(raw: Tensor, bias: Tensor, A: Tensor, limit: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """dt and a (l, h) of one sequence from its first token on."""
    dt = F.softplus(raw + bias, threshold=1e9).clamp(*limit)
    return dt, torch.cat([(part * A).cumsum(0) for part in dt.split(CHUNK)])


def rows(chunks: Tensor, segments: Segments) -> Tensor:
    """(c, h, CHUNK) back to (tokens, h)."""
    return segments.collect(chunks.transpose(1, 2))[: segments.tokens]


@pytest.mark.parametrize("limit", [ANY, (0.001, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 307])
@pytest.mark.usefixtures("form")
def test_equals_the_definition(length: int, dtype: torch.dtype, limit: tuple[float, float]) -> None:
    segments = Segments((0,), (length,))
    raw, bias, A = random(segments)
    wide = torch.cat((raw, raw, raw), dim=1).to(dtype)
    raw = wide[:, H : 2 * H]  # columns of a wider matrix
    dt, a = steps(raw, bias, A, limit, segments, None)
    want_dt, want_a = defined(raw[:length].double(), bias.double(), A.double(), limit)
    # each step by its own size: small ones decide how long the layer remembers
    assert ((rows(dt, segments) - want_dt).abs() <= ROUNDING * want_dt + 1e-30).all()
    assert_near(rows(a, segments), want_a, ROUNDING)
    assert (dt[-1, :, length - (segments.num_chunks - 1) * CHUNK :] == 0).all()


@pytest.mark.usefixtures("form")
def test_steps_far_from_zero_lose_nothing() -> None:
    segments = Segments((0,), (8,))
    raw = torch.tensor([-80.0, -30, -10, -1e-6, 1e-6, 10, 30, 500])[:, None].expand(8, H)
    dt, _ = steps(raw, torch.zeros(H), -torch.ones(H), ANY, segments, None)
    want = F.softplus(raw.double(), threshold=1e9)
    assert ((rows(dt, segments) - want).abs() <= ROUNDING * want).all()


@pytest.mark.usefixtures("form")
def test_cut_equals_whole_to_the_bit() -> None:
    whole = Segments((0,), (200,))
    raw, bias, A = random(whole)
    want = [rows(t, whole) for t in steps(raw, bias, A, ANY, whole, None)]
    kept, done = torch.zeros(1, H, CHUNK), 0
    for length in (1, 2, 61, 1, 64, 3, 68):
        part = Segments((done,), (length,))
        new = torch.cat((raw[done : done + length], raw.new_full((part.rows - length, H), 9.0)))
        dt, a = steps(new, bias, A, ANY, part, kept)
        for got, exact in zip((dt, a), want, strict=True):
            assert torch.equal(rows(got, part), exact[done : done + length])
        kept, done = dt[part.chunk_runs.sum(1) - 1], done + length


@pytest.mark.parametrize("lengths", [(1,), (64,), (65, 3), (130, 7)])
@pytest.mark.parametrize("limit", [ANY, (0.5, 5.0)])
@pytest.mark.usefixtures("form")
def test_gradients_equal_the_definitions(lengths: tuple[int, ...], limit: tuple[float, float]) -> None:
    segments = Segments((0,) * len(lengths), lengths)
    leaves = [t.requires_grad_() for t in random(segments)]
    factors = [torch.randn(segments.tokens, H, generator=seeded(seed)) for seed in (1, 2)]
    outs = steps(*leaves, limit, segments, None)
    got = torch.autograd.grad(
        sum((rows(out, segments) * factor).sum() for out, factor in zip(outs, factors, strict=True)), leaves
    )
    exact = [double(t) for t in leaves]
    total = torch.zeros((), dtype=torch.float64)
    for begin, length in zip(segments.begins, lengths, strict=True):
        part = slice(begin, begin + length)
        for out, factor in zip(defined(exact[0][part], *exact[1:], limit), factors, strict=True):
            total = total + (out * factor[part]).sum()
    want = torch.autograd.grad(total, exact)
    for name, value, exact_value in zip(("raw", "bias", "A"), got, want, strict=True):
        assert_near(value, exact_value, 1e-5, name)


def test_what_cannot_be_is_refused_by_name() -> None:
    segments = Segments((3,), (8,))
    raw, bias, A = random(segments)
    with pytest.raises(ShapeError, match=r"^kept: must hold the steps before the rows, which begin at 3; got None"):
        steps(raw, bias, A, ANY, segments, None)
    with pytest.raises(ShapeError, match=r"^kept: must have shape \(1, 5, 64\)"):
        steps(raw, bias, A, ANY, segments, torch.zeros(1, CHUNK, H))
    with pytest.raises(ShapeError, match=r"^kept: must be None where gradients are wanted"):
        steps(raw.requires_grad_(), bias, A, ANY, segments, torch.zeros(1, H, CHUNK))
    with pytest.raises(ShapeError, match=r"^A: must be torch.float32"):
        steps(raw.detach(), bias, A.double(), ANY, segments, torch.zeros(1, H, CHUNK))
