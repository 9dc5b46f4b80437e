import pytest
import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.ops.conv import causal_conv, conv_definition, keep_last
from nemotron_h.ops.segments import Segments
from tests.compare import assert_near, double, seeded

CHANNELS = 21  # a vector's width and a tail
ROUNDING = 2e-6  # float32 sums of kernel + 1 terms, and an exp of a few units in the last place


def weights(kernel: int = 4, channels: int = CHANNELS) -> tuple[Tensor, Tensor]:
    generator = seeded(0)
    return torch.randn(channels, 1, kernel, generator=generator), torch.randn(channels, generator=generator)


def rows(segments: Segments, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values in the padding too, that nothing may read."""
    return torch.randn(segments.rows, CHANNELS, generator=seeded(seed)).to(dtype)


def defined(x: Tensor, weight: Tensor, bias: Tensor, segments: Segments, carried: Tensor | None) -> Tensor:
    """(tokens, channels) in float64, one segment at a time."""
    parts, reach = [], weight.shape[-1] - 1
    of_segments = zip(segments.starts, segments.begins, segments.lengths, strict=True)
    for index, (start, begin, length) in enumerate(of_segments):
        before = x.new_zeros(reach, x.shape[1])
        if carried is not None and reach:
            ring = carried.shape[1]
            before = torch.stack([carried[index, (start - back) % ring] for back in range(reach, 0, -1)])
        part = conv_definition(x[begin : begin + length].double(), weight.double(), bias.double(), before.double())
        parts.append(part)
    return torch.cat(parts)


@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 63, 64, 65, 127, 128, 129, 307, 1000, 4096])
@pytest.mark.usefixtures("form")
def test_equals_the_definition(length: int, carries: bool) -> None:
    segments = Segments((0,), (length,))
    x, (weight, bias) = rows(segments, length), weights()
    carried = torch.randn(1, 3, CHANNELS, generator=seeded(1)) if carries else None
    got = causal_conv(x, weight, bias, segments, carried)
    assert_near(got[:length], defined(x, weight, bias, segments, carried), ROUNDING)


@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
@pytest.mark.parametrize("spare", [0, 1, 15])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 64, 1, 5), (3, 127, 130)])
@pytest.mark.usefixtures("form")
def test_a_segment_reads_its_own_past_and_nothing_else(lengths: tuple[int, ...], spare: int, kernel: int) -> None:
    segments = Segments(tuple(range(7, 7 + len(lengths))), lengths)
    x, (weight, bias) = rows(segments, 3), weights(kernel)
    carried = torch.randn(len(lengths), kernel - 1 + spare, CHANNELS, generator=seeded(2))
    got = causal_conv(x, weight, bias, segments, carried)
    assert_near(got[: segments.tokens], defined(x, weight, bias, segments, carried), ROUNDING)
    assert (got[segments.tokens :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("form")
def test_cut_equals_whole_to_the_bit(dtype: torch.dtype) -> None:
    whole = Segments((0,), (150,))
    x, (weight, bias) = rows(whole, 4, dtype), weights()
    want = causal_conv(x, weight, bias, whole, None)
    ring = 5
    carried, done = torch.zeros(1, ring, CHANNELS, dtype=dtype), 0
    for length in (1, 1, 2, 3, 57, 1, 85):
        part = Segments((done,), (length,))
        new = torch.cat((x[done : done + length], x.new_zeros(part.rows - length, CHANNELS)))
        got = causal_conv(new, weight, bias, part, carried)
        assert torch.equal(got[:length], want[done : done + length])
        keep_last(new, part, carried)
        done += length
        for place in range(max(0, done - ring), done):
            assert torch.equal(carried[0, place % ring], x[place])
        assert (carried[0, done:] == 0).all()


@pytest.mark.usefixtures("form")
def test_who_read_too_far_goes_back() -> None:
    """Rows that turn out not to come leave nothing: the ring still has what the next row reads."""
    whole, spare = Segments((0,), (60,)), 6
    x, (weight, bias) = rows(whole, 40), weights()
    want = causal_conv(x, weight, bias, whole, None)
    carried, done = torch.zeros(1, 3 + spare, CHANNELS), 0
    while done < 50:
        part = Segments((done,), (1 + spare,))
        wrong = rows(part, 41 + done)
        known = done % 3 + 1  # rows of the draft that come indeed
        wrong[:known] = x[done : done + known]
        got = causal_conv(wrong, weight, bias, part, carried)
        assert torch.equal(got[:known], want[done : done + known])
        keep_last(wrong, part, carried)
        done += known


@pytest.mark.usefixtures("form")
def test_no_token_reads_a_later_one() -> None:
    segments = Segments((0,), (130,))
    x, (weight, bias) = rows(segments, 5), weights()
    before = causal_conv(x, weight, bias, segments, None)
    for place in (0, 3, 64, 129):
        changed = x.clone()
        changed[place] += 1
        after = causal_conv(changed, weight, bias, segments, None)
        assert torch.equal(before[:place], after[:place])
        assert not torch.equal(before[place], after[place])


@pytest.mark.parametrize("kernel", [2, 4])
@pytest.mark.parametrize("lengths", [(1,), (3,), (64,), (130,), (1, 2, 67, 3, 200)])
@pytest.mark.usefixtures("form")
def test_gradients_equal_the_definitions(lengths: tuple[int, ...], kernel: int) -> None:
    """Segments end inside and at the edges of the pieces that the kernel's gradient works in."""
    segments = Segments((0,) * len(lengths), lengths)
    leaves = [rows(segments, 6).requires_grad_(), *(t.requires_grad_() for t in weights(kernel))]
    factor = torch.randn(segments.rows, CHANNELS, generator=seeded(7))
    got = torch.autograd.grad((causal_conv(*leaves, segments, None) * factor).sum(), leaves)
    exact = [double(t) for t in leaves]
    want = torch.autograd.grad((defined(*exact, segments, None) * factor[: segments.tokens]).sum(), exact)
    for name, value, exact_value in zip(("x", "weight", "bias"), got, want, strict=True):
        assert value.dtype == torch.float32
        assert_near(value, exact_value, 5e-6, name)


@pytest.mark.usefixtures("form")
def test_bfloat16_rounds_once() -> None:
    segments = Segments((0, 0), (65, 30))
    x = rows(segments, 8, torch.bfloat16).requires_grad_()
    weight, bias = (t.bfloat16().requires_grad_() for t in weights())
    got = causal_conv(x, weight, bias, segments, None)
    want = defined(x, weight, bias, segments, None)
    assert got.dtype == torch.bfloat16
    assert_near(got[: segments.tokens].detach(), want.detach(), 2**-8)  # the rounding of the output
    factor = torch.randn(segments.rows, CHANNELS, generator=seeded(9)).bfloat16()
    grads = torch.autograd.grad((got * factor).sum(), (x, weight, bias))
    exact = [double(t) for t in (x, weight, bias)]
    wanted = torch.autograd.grad((defined(*exact, segments, None) * factor[: segments.tokens]).sum(), exact)
    for value, exact_value in zip(grads, wanted, strict=True):
        assert value.dtype == torch.bfloat16
        assert_near(value, exact_value, 2**-8)


@pytest.mark.usefixtures("form")
def test_large_inputs_saturate_without_infinities() -> None:
    segments = Segments((0,), (8,))
    x = torch.cat((torch.full((4, CHANNELS), 1e4), torch.full((4, CHANNELS), -1e4))).requires_grad_()
    weight, bias = torch.ones(CHANNELS, 1, 4, requires_grad=True), torch.zeros(CHANNELS, requires_grad=True)
    out = causal_conv(x, weight, bias, segments, None)
    want = defined(x, weight, bias, segments, None)
    assert_near(out.detach(), want.detach(), ROUNDING)
    got = torch.autograd.grad(out.sum(), (x, weight, bias))
    for value, exact in zip(got, torch.autograd.grad(want.sum(), (x, weight, bias)), strict=True):
        assert_near(value, exact, ROUNDING)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(4, CHANNELS)),
        ("weight", torch.zeros(CHANNELS, 4)),
        ("bias", torch.zeros(CHANNELS + 1)),
        ("carried", torch.zeros(2, 3, CHANNELS)),
        ("carried", torch.zeros(1, 3, CHANNELS, dtype=torch.bfloat16)),
    ],
)
def test_wrong_shapes_are_refused_by_name(name: str, value: Tensor) -> None:
    segments = Segments((0,), (5,))
    weight, bias = weights()
    arguments = {"x": rows(segments, 0), "weight": weight, "bias": bias, "carried": torch.zeros(1, 3, CHANNELS)}
    causal_conv(**arguments, segments=segments)
    with pytest.raises(ShapeError, match=f"^{name}: must"):
        causal_conv(**(arguments | {name: value}), segments=segments)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "carried"])
def test_gradients_through_a_state_are_refused(name: str) -> None:
    segments = Segments((3,), (8,))
    weight, bias = weights()
    given = {"x": rows(segments, 0), "weight": weight, "bias": bias, "carried": torch.zeros(1, 3, CHANNELS)}
    given = {key: value.detach() for key, value in given.items()}
    causal_conv(**given, segments=segments)
    given[name].requires_grad_()
    with pytest.raises(ShapeError, match="carried: must be None where gradients are wanted"):
        causal_conv(**given, segments=segments)
