"""Letters as in ops/ssd.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import pytest
import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.grid import CHUNK
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.ssd import Past, keep_inputs, ssd, ssd_recurrence
from tests.compare import assert_near, double, seeded
from tests.kernels import needs_kernels

LENGTHS = [1, 63, 64, 65, 127, 128, 129, 256, 307, 1000, 4096]
H, P, G, N = 4, 8, 2, 16
# float32 products of 64 terms, and decays whose exponents, sums of up to about 50, are rounded to float32
ROUNDING = 1e-5


@dataclass
class Inputs:
    """One sequence of l tokens: x (l, h, p), dt (l, h), B and C (l, g, n), float32."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor

    @classmethod
    def random(cls, length: int, seed: int, p: int = P, g: int = G, n: int = N) -> Self:
        generator = seeded(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(length, *shape, generator=generator)

        dt = 10 ** (-3 + 2 * torch.rand(length, H, generator=generator))  # 0.001 to 0.1, as a new model's
        return cls(normal(H, p), dt, normal(g, n), normal(g, n))

    def side_by_side(self) -> Tensor:
        """(l, h p + 2 g n), as the op takes them."""
        return torch.cat((self.x.flatten(1), self.B.flatten(1), self.C.flatten(1)), dim=1)

    def part(self, first: int, last: int) -> "Inputs":
        return Inputs(*(t[first:last] for t in (self.x, self.dt, self.B, self.C)))


def decay_rates(seed: int = 0) -> Tensor:
    return -1 - 15 * torch.rand(H, generator=seeded(seed))


def defined(inputs: Inputs, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y (l, h, p) and the state after, in float64."""
    x, dt, B, C = (t.double()[None] for t in (inputs.x, inputs.dt, inputs.B, inputs.C))
    y, after = ssd_recurrence(x, dt, A.double(), B, C, state.double()[None])
    return y[0], after[0]


def chunked(
    sequences: list[Inputs], starts: list[int], A: Tensor, boundary: Tensor | None, D: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Each sequence's tokens from its start on, the earlier ones kept as far as its chunk at hand goes back.

    boundary: (s, h, p, n), the states before those. Returns: y (l - start, h, p) of each; the states at the beginning
    of the last chunks, (s, h, p, n), None where none were given.
    """
    segments = Segments(tuple(starts), tuple(len(s.x) - start for s, start in zip(sequences, starts, strict=True)))
    inputs = torch.cat([s.side_by_side()[start:] for s, start in zip(sequences, starts, strict=True)])
    rows = torch.cat((inputs, torch.full((segments.rows - segments.tokens, inputs.shape[1]), 9.0, dtype=inputs.dtype)))
    g, n, p = *sequences[0].B.shape[1:], sequences[0].x.shape[2]
    dt = segments.spread(
        torch.cat(
            [s.dt[start:] for s, start in zip(sequences, starts, strict=True)]
            + [torch.zeros(segments.rows - segments.tokens, H)]
        )
    ).transpose(1, 2)
    past = None
    if boundary is not None:
        kept = [s.part(start - held, start) for s, start, held in zip(sequences, starts, segments.carried, strict=True)]

        def filled(t: Tensor) -> Tensor:  # (places, columns) to (CHUNK, columns)
            return torch.cat(
                (t.flatten(1), t.new_zeros(CHUNK - len(t), t[0].numel() if len(t) else t.shape[1:].numel()))
            )

        x = torch.stack([filled(k.x).view(CHUNK, H, p).transpose(0, 1) for k in kept]).contiguous()
        B = torch.stack([filled(k.B).T.reshape(g, n, CHUNK) for k in kept])
        past = Past(boundary.transpose(2, 3).clone(memory_format=torch.contiguous_format), x, B)
        dt = segments.after_kept(dt, torch.stack([filled(k.dt).T for k in kept]), dim=2)
    dt = dt.contiguous()
    a = (dt.double() * A.double()[:, None]).cumsum(2).float()
    skip = torch.zeros(H) if D is None else D
    y = ssd(rows, dt, a, skip, segments, past, num_groups=g, state_size=n)
    assert (y[segments.tokens :] == 0).all()
    parts = [y[begin : begin + length] for begin, length in zip(segments.begins, segments.lengths, strict=True)]
    return [part.unflatten(1, (H, p)) for part in parts], None if past is None else past.boundary.transpose(2, 3)


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.usefixtures("form")
def test_chunks_equal_the_recurrence(length: int, initial: bool) -> None:
    A, inputs = decay_rates(), Inputs.random(length, seed=length)
    state = torch.randn(H, P, N, generator=seeded(1)) * initial
    (got,), moved = chunked([inputs], [0], A, state[None] if initial else None)
    assert_near(got, defined(inputs, A, state)[0], ROUNDING)
    at = (length - 1) // CHUNK * CHUNK
    assert (moved is not None) == initial
    if initial and at:
        assert_near(moved[0], defined(inputs.part(0, at), A, state)[1], ROUNDING, "state")
    elif initial:
        assert torch.equal(moved[0], state)


@pytest.mark.parametrize(("p", "g", "n"), [(8, 1, 16), (8, 4, 16), (5, 2, 6), (80, 1, 256), (1, 1, 1)])
@pytest.mark.usefixtures("form")
def test_every_width_and_every_way_to_share_b_and_c(p: int, g: int, n: int) -> None:
    A, inputs = decay_rates(), Inputs.random(70, seed=3, p=p, g=g, n=n)
    (got,), moved = chunked([inputs], [0], A, torch.zeros(1, H, p, n))
    assert_near(got, defined(inputs, A, torch.zeros(H, p, n))[0], ROUNDING)
    (again,), _ = chunked([inputs], [0], A, None)
    assert torch.equal(again, got)
    assert_near(moved[0], defined(inputs.part(0, 64), A, torch.zeros(H, p, n))[1], ROUNDING, "state")


@pytest.mark.parametrize(
    ("starts", "lengths"),
    [
        ([0, 0, 0, 0], [1, 64, 129, 307]),
        ([0, 0], [64, 64]),
        ([5, 64, 65, 127, 128, 0], [1, 1, 1, 1, 1, 1]),  # a decode step of sequences at different places
        ([63, 64, 1], [1, 64, 200]),
        ([100, 64, 0], [28, 65, 3]),
        ([70, 70], [300, 300]),
    ],
)
@pytest.mark.usefixtures("form")
def test_ragged_segments_with_inputs_kept(starts: list[int], lengths: list[int]) -> None:
    A = decay_rates()
    sequences = [Inputs.random(s + n, seed=10 + i) for i, (s, n) in enumerate(zip(starts, lengths, strict=True))]
    boundaries = []
    for sequence, start in zip(sequences, starts, strict=True):
        at = (start - 1) // CHUNK * CHUNK if start else 0
        state = torch.zeros(H, P, N)
        boundaries.append(defined(sequence.part(0, at), A, state)[1].float() if at else state)
    ys, moved = chunked(sequences, starts, A, torch.stack(boundaries))
    for index, (sequence, start, length) in enumerate(zip(sequences, starts, lengths, strict=True)):
        want = defined(sequence, A, torch.zeros(H, P, N))[0]
        assert_near(ys[index], want[start:], ROUNDING, f"segment {index}")
        at = (start + length - 1) // CHUNK * CHUNK
        if at > max(start - 1, 0) // CHUNK * CHUNK:
            assert_near(moved[index], defined(sequence.part(0, at), A, torch.zeros(H, P, N))[1], ROUNDING)
        else:
            assert torch.equal(moved[index], boundaries[index])


@pytest.mark.usefixtures("form")
def test_a_token_alone_has_the_bits_of_the_whole() -> None:
    A, inputs = decay_rates(), Inputs.random(200, seed=4)
    (whole,), _ = chunked([inputs], [0], A, torch.zeros(1, H, P, N))
    for place in (0, 1, 5, 62, 63, 64, 65, 127, 128, 199):
        at = (place - 1) // CHUNK * CHUNK if place else 0
        boundary = torch.zeros(1, H, P, N)
        if at:  # the library's own state: the definition's has other bits
            _, boundary = chunked([inputs.part(0, at + 1)], [0], A, boundary)
        (alone,), _ = chunked([inputs.part(0, place + 1)], [place], A, boundary)
        assert torch.equal(alone[0], whole[place]), place


@pytest.mark.usefixtures("form")
def test_d_adds_each_tokens_own_input() -> None:
    A, D = decay_rates(), torch.randn(H, generator=seeded(9))
    sequences = [Inputs.random(130, seed=11), Inputs.random(70, seed=12)]
    got, _ = chunked(sequences, [0, 64], A, torch.zeros(2, H, P, N), D=D)
    for inputs, start, y in zip(sequences, (0, 64), got, strict=True):
        chunk = inputs.part((start - 1) // CHUNK * CHUNK if start else 0, len(inputs.x))
        want = defined(chunk, A, torch.zeros(H, P, N))[0] + D.double()[:, None] * chunk.x.double()
        assert_near(y, want[len(want) - len(y) :], ROUNDING)


@pytest.mark.parametrize("place", [0, 1, 63, 64, 100, 306])
@pytest.mark.usefixtures("form")
def test_no_token_reads_a_later_one(place: int) -> None:
    A, inputs = decay_rates(), Inputs.random(307, seed=5)
    other = Inputs.random(307, seed=6)
    changed = Inputs(*(t.clone() for t in (inputs.x, inputs.dt, inputs.B, inputs.C)))
    for name in ("x", "dt", "B", "C"):
        getattr(changed, name)[place] = getattr(other, name)[place]
    (before,), _ = chunked([inputs], [0], A, None)
    (after,), _ = chunked([changed], [0], A, None)
    assert torch.equal(before[:place], after[:place])
    assert not torch.equal(before[place], after[place])


@pytest.mark.parametrize(
    "lengths",
    [[1], [30], [63], [64], [65], [129], [307], [128, 128], [1, 64, 130], pytest.param([1000], marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("form")
def test_gradients_equal_the_recurrences(lengths: list[int]) -> None:
    check_gradients(lengths)


@pytest.mark.parametrize(
    ("p", "g", "n", "length"), [(5, 1, 6, 70), (40, 4, 24, 130), (80, 1, 17, 65), (17, 2, 64, 12), (64, 4, 16, 1)]
)
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_at_every_width(
    p: int, g: int, n: int, length: int, count: int, threads: Callable[[int], None]
) -> None:
    """Widths that are not whole vectors, and chunks with fewer queries than places."""
    threads(count)
    check_gradients([length], p, g, n)


def check_gradients(lengths: list[int], p: int = P, g: int = G, n: int = N) -> None:
    A = decay_rates()
    sequences = [Inputs.random(length, 20 + i, p, g, n) for i, length in enumerate(lengths)]
    factors = [torch.randn(length, H, p, generator=seeded(3)) for length in lengths]

    skip = torch.randn(H, generator=seeded(2))
    leaves = [t.requires_grad_() for t in (*(t for s in sequences for t in (s.x, s.dt, s.B, s.C)), A, skip)]
    ys, _ = chunked(sequences, [0] * len(lengths), A, None, D=skip)
    got = torch.autograd.grad(sum((y * factor).sum() for y, factor in zip(ys, factors, strict=True)), leaves)

    exact = [double(t) for t in leaves]
    wanted_loss = torch.zeros((), dtype=torch.float64)
    for index, factor in enumerate(factors):
        own = Inputs(*exact[4 * index : 4 * index + 4])
        y = defined(own, exact[-2], torch.zeros(H, p, n))[0] + exact[-1][:, None] * own.x
        wanted_loss = wanted_loss + (y * factor).sum()
    want = torch.autograd.grad(wanted_loss, exact)
    names = [f"{name} of {i}" for i in range(len(lengths)) for name in ("x", "dt", "B", "C")] + ["A", "D"]
    for name, value, exact_value in zip(names, got, want, strict=True):
        # gradients of dt and A are differences of sums over the chunk, larger than what is left of them
        assert_near(value, exact_value, 1e-4 if name == "A" or "dt" in name else 2e-5, name)


@pytest.mark.usefixtures("form")
def test_what_decays_at_once_stays_finite() -> None:
    """dt A of -800 a token: exponents of a chunk reach -51,200, and the gradients are those of the last token alone."""
    inputs = Inputs.random(130, seed=7)
    inputs.dt.fill_(50.0)
    A = torch.full((H,), -16.0)
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.dt, inputs.B, inputs.C)]
    (got,), _ = chunked([inputs], [0], A, None)
    assert_near(got.detach(), defined(inputs, A, torch.zeros(H, P, N))[0].detach(), ROUNDING)
    exact = [double(t) for t in leaves]
    wanted = torch.autograd.grad(defined(Inputs(*exact), A, torch.zeros(H, P, N))[0].sum(), exact)
    for value, exact_value in zip(torch.autograd.grad(got.sum(), leaves), wanted, strict=True):
        assert_near(value, exact_value, 1e-4)


@needs_kernels
def test_what_has_faded_is_nothing() -> None:
    """dt A of -1.5 a token, and only the first one says anything: what is left of it gets smaller than the smallest
    number of float32's full precision. Such numbers would make a CPU slow, and say nothing."""
    inputs, A = Inputs.random(130, seed=7), torch.full((H,), -15.0)
    inputs.dt.fill_(0.1)
    inputs.x[1:], inputs.B[1:] = 0.0, 0.0
    (y,), state = chunked([inputs], [0], A, torch.zeros(1, H, P, N))
    assert state is not None
    leaves = [t.clone().requires_grad_() for t in (inputs.x, inputs.dt, inputs.B, inputs.C)]
    (again,), _ = chunked([Inputs(*leaves)], [0], A, None)
    gradients = torch.autograd.grad(again.sum(), leaves)
    for value in (y, state, *gradients):
        assert not ((value != 0) & (value.abs() < torch.finfo(torch.float32).tiny)).any()
    want, _ = defined(inputs, A, torch.zeros(H, P, N))
    assert (y - want).abs().max() < ROUNDING * want.abs().max()
    assert (y[45:] == 0).all()
    assert want[45:].abs().max() > 0


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    A, inputs = decay_rates(), Inputs.random(200, seed=8)
    narrow = Inputs(inputs.x.bfloat16(), inputs.dt, inputs.B.bfloat16(), inputs.C.bfloat16())
    (got,), _ = chunked([narrow], [0], A, None)
    assert got.dtype == torch.float32
    assert_near(got, defined(narrow, A, torch.zeros(H, P, N))[0], ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("form")
def test_what_is_kept_are_the_inputs_of_the_chunk_at_hand(dtype: torch.dtype) -> None:
    inputs = Inputs.random(200, seed=13).side_by_side().to(dtype)
    x, B = torch.zeros(1, H, CHUNK, P, dtype=dtype), torch.zeros(1, G, N, CHUNK, dtype=dtype)
    kept_dt, done = torch.zeros(1, H, CHUNK), 0
    for length in (1, 5, 57, 1, 1, 3, 100, 32):  # the fourth fills a chunk, the fifth begins one
        segments = Segments((done,), (length,))
        dt = torch.randn(segments.num_chunks, H, CHUNK, generator=seeded(done))
        rows = inputs[done : done + length]
        given = torch.cat((rows, rows.new_full((segments.rows - length, rows.shape[1]), 9)))
        keep_inputs(given, dt, segments, x, B, kept_dt)
        done += length
        at = (done - 1) // CHUNK * CHUNK
        want_x, want_B, _ = inputs[at:done].split([H * P, G * N, G * N], dim=1)
        assert torch.equal(x[0, :, : done - at].transpose(0, 1).flatten(1), want_x)
        assert torch.equal(B[0].flatten(0, 1)[:, : done - at].T, want_B)
        assert (x[0, :, done - at :] == 0).all()
        assert (B[..., done - at :] == 0).all()
        assert torch.equal(kept_dt[0], dt[segments.chunk_runs[0].sum() - 1])


def arguments(segments: Segments) -> dict[str, Tensor]:
    shape = (segments.num_chunks, H, CHUNK)
    inputs = torch.zeros(segments.rows, H * P + 2 * G * N)
    return {"inputs": inputs, "dt": torch.zeros(shape), "a": torch.zeros(shape), "D": torch.zeros(H)}


@pytest.mark.parametrize("name", ["inputs", "dt", "a", "D", "past.boundary"])
@pytest.mark.usefixtures("form")
def test_gradients_through_a_state_are_refused(name: str) -> None:
    segments = Segments((5,), (20,))
    given, boundary = arguments(segments), torch.zeros(1, H, N, P)
    past = Past(boundary, torch.zeros(1, H, CHUNK, P), torch.zeros(1, G, N, CHUNK))
    ssd(**given, segments=segments, past=past, num_groups=G, state_size=N)
    (given | {"past.boundary": boundary})[name].requires_grad_()
    with pytest.raises(ShapeError, match=r"^past: must be None where gradients are wanted"):
        ssd(**given, segments=segments, past=past, num_groups=G, state_size=N)
    with torch.no_grad():
        ssd(**given, segments=segments, past=past, num_groups=G, state_size=N)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("inputs", (96, H * P + 2 * G * N), torch.float32),
        ("inputs", (100, H * P + 2 * G * N + 1), torch.float32),
        ("inputs", (100, 2 * G * N), torch.float32),
        ("dt", (2, CHUNK, H), torch.float32),
        ("dt", (2, H, CHUNK), torch.float64),
        ("a", (1, H, CHUNK), torch.float32),
        ("D", (H,), torch.bfloat16),
        ("boundary", (1, H, P, N), torch.float32),
        ("x", (1, H, CHUNK, P), torch.bfloat16),
        ("x", (1, CHUNK, H, P), torch.float32),
        ("B", (1, G, CHUNK, N), torch.float32),
    ],
)
def test_wrong_shapes_are_refused_by_name(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    segments = Segments((0,), (100,))
    given = arguments(segments)
    past = {"boundary": torch.zeros(1, H, N, P), "x": torch.zeros(1, H, CHUNK, P), "B": torch.zeros(1, G, N, CHUNK)}
    ssd(**given, segments=segments, past=Past(**past), num_groups=G, state_size=N)
    (past if name in past else given)[name] = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ShapeError, match=f"^{'past.' if name in past else ''}{name}: must"):
        ssd(**given, segments=segments, past=Past(**past), num_groups=G, state_size=N)


def test_groups_that_do_not_divide_and_a_past_that_is_missing_are_refused() -> None:
    segments = Segments((0,), (100,))
    with pytest.raises(ShapeError, match=r"^num_groups: must divide the 4 heads of D; got 3"):
        ssd(**arguments(segments), segments=segments, past=None, num_groups=3, state_size=N)
    segments = Segments((7,), (100,))
    with pytest.raises(ShapeError, match=r"^past: must hold what lies before the rows, which begin at 7; got None"):
        ssd(**arguments(segments), segments=segments, past=None, num_groups=G, state_size=N)


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.usefixtures("form")
def test_steps_may_lie_turned(wanted: bool) -> None:
    segments, A = Segments((0,), (100,)), decay_rates()
    one = Inputs.random(segments.rows, seed=5)
    inputs = one.side_by_side().requires_grad_(wanted)
    dt = segments.spread(one.dt).transpose(1, 2)
    a = (dt.double() * A.double()[:, None]).cumsum(2).float()
    assert not dt.is_contiguous()
    given = ((dt, a), (dt.contiguous(), a.contiguous()))
    ys = [ssd(inputs, *steps, torch.ones(H), segments, None, num_groups=G, state_size=N) for steps in given]
    assert torch.equal(*ys)
    if wanted:
        assert torch.equal(*(torch.autograd.grad(y.sum(), inputs)[0] for y in ys))
