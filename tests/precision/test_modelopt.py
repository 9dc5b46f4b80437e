"""FP8 and NVFP4 weights decode to what their formats say, rounded once, for every code there is."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from nemotron_h.errors import CheckpointError
from nemotron_h.precision import modelopt
from nemotron_h.precision.modelopt import decode, decode_fp8, decode_nvfp4, rounded_once

DTYPES = [torch.float32, torch.bfloat16]
NAME = "layer.weight"
NAN = math.nan


def e4m3(code: int) -> float:
    """The number of an OCP FP8 E4M3 code, from its bit fields: sign 1, exponent 4 (bias 7), fraction 3; no infinity."""
    sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return NAN
    size = fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)
    return -size if sign else size


def e2m1(code: int) -> float:
    """The number of an OCP FP4 E2M1 code: sign 1, exponent 2 (bias 1), fraction 1."""
    sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
    size = fraction * 0.5 if exponent == 0 else (2 + fraction) * 2.0 ** (exponent - 2)
    return -size if sign else size


def nearest(value: float, dtype: torch.dtype) -> float:
    """The number of dtype nearest to a float64, ties to the even one, in exact fractions."""
    if value == 0 or not math.isfinite(value):
        return value
    bits = {torch.float32: 24, torch.bfloat16: 8}[dtype]
    exponent = max(math.frexp(value)[1], -125)  # both have float32's exponents
    unit = Fraction(2) ** (exponent - bits)
    rounded = round(Fraction(value) / unit) * unit  # Python's round: ties to even
    return math.copysign(math.inf, value) if abs(rounded) >= Fraction(2) ** 128 else float(rounded)


def codes(bits: list[int], dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.tensor(bits, dtype=torch.uint8).view(dtype)


def assert_same(got: Tensor, want: list[float]) -> None:
    assert torch.equal(got.double().flatten().nan_to_num(nan=12345), torch.tensor(want).double().nan_to_num(nan=12345))


SCALES = [1.0, 1 / 448, 0.0123456789, 3.0e38, 1e-44, 2.0**-130, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_fp8_code(scale: float, dtype: torch.dtype) -> None:
    scalar = torch.tensor(scale)
    got = decode_fp8(codes(list(range(256)), torch.float8_e4m3fn).view(16, 16), scalar, dtype)
    assert got.dtype == dtype
    assert_same(got, [nearest(e4m3(code) * scalar.double().item(), dtype) for code in range(256)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_nvfp4_code_under_every_block_scale(scale: float, dtype: torch.dtype) -> None:
    """Row i: the 256 bytes, 512 codes, in 32 blocks that share the scale of code i."""
    scalar = torch.tensor(scale)
    packed = codes(list(range(256))).repeat(256, 1)
    scales = codes(list(range(256)), torch.float8_e4m3fn)[:, None].expand(256, 32).contiguous()
    got = decode_nvfp4(packed, scales, scalar, dtype)
    values = [value for byte in range(256) for value in (e2m1(byte & 15), e2m1(byte >> 4))]  # low half first
    for row in (0, 1, 7, 8, 56, 119, 126, 127, 128, 254, 255):
        block = e4m3(row) * scalar.double().item()
        assert_same(got[row], [nearest(value * block, dtype) for value in values])


def test_each_block_has_its_own_scale() -> None:
    packed = codes([0x22] * 16).view(1, 16)  # thirty-two ones
    scales = torch.tensor([[2.0, 0.5]]).to(torch.float8_e4m3fn)
    got = decode_nvfp4(packed, scales, torch.tensor(4.0), torch.float32)
    assert got.tolist() == [[8.0] * 16 + [2.0] * 16]


@pytest.mark.parametrize("at_once", [1, 40, 64])
def test_portions_make_no_difference(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(256, (7, 16), generator=generator, dtype=torch.uint8)
    scales = torch.rand(7, 2, generator=generator).to(torch.float8_e4m3fn)
    scale, fp8 = torch.tensor(0.3), (packed % 127).view(torch.float8_e4m3fn)
    whole = decode_nvfp4(packed, scales, scale, torch.float32), decode_fp8(fp8, scale, torch.float32)
    monkeypatch.setattr(modelopt, "AT_ONCE", at_once)
    assert torch.equal(decode_nvfp4(packed, scales, scale, torch.float32), whole[0])
    assert torch.equal(decode_fp8(fp8, scale, torch.float32), whole[1])


def test_bfloat16_is_rounded_once() -> None:
    """A little above a tie: by way of float32 it becomes the tie, and then the wrong neighbour."""
    above = torch.tensor([1 + 2**-8 + 2**-30, -1 - 2**-8 - 2**-30], dtype=torch.float64)
    assert above.bfloat16().tolist() == [1.0, -1.0]
    assert rounded_once(above, torch.bfloat16).tolist() == [1 + 2**-7, -1 - 2**-7]


def test_rounding_equals_exact_fractions() -> None:
    generator = torch.Generator().manual_seed(3)
    significands = torch.randint(2**29, 2**30, (4000,), generator=generator).double()
    significands[::2] = significands[::2] // 2**22 * 2**22 + 2**21  # ties of bfloat16, and what is just beside them
    significands[::4] += torch.randint(-1, 2, (1000,), generator=generator)
    exponents = torch.randint(-180, 128, (4000,), generator=generator)
    values = torch.ldexp(significands, exponents - 30) * torch.sign(torch.rand(4000, generator=generator) - 0.5)
    for dtype in DTYPES:
        assert_same(rounded_once(values, dtype), [nearest(value, dtype) for value in values.tolist()])


def fp8() -> dict[str, Tensor]:
    return {"weight": torch.ones(4, 32).to(torch.float8_e4m3fn), "weight_scale": torch.tensor(2.0)}


def nvfp4() -> dict[str, Tensor]:
    return {
        "weight": torch.full((4, 16), 0x22, dtype=torch.uint8),
        "weight_scale": torch.ones(4, 2).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor([2.0]),
    }


@pytest.mark.parametrize("parts", [fp8(), nvfp4()])
def test_a_whole_weight(parts: dict[str, Tensor]) -> None:
    got = decode(NAME, parts, torch.Size((4, 32)), torch.bfloat16)
    assert torch.equal(got, torch.full((4, 32), 2.0, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            fp8() | {"weight_scale": None},
            r"layer\.weight_scale: missing; layer\.weight is stored in FP8, with weight, w",
        ),
        (fp8() | {"weight_scale_2": torch.tensor(1.0)}, r"layer\.weight_scale_2: must not be there; .* in FP8"),
        (
            fp8() | {"weight_scale": torch.ones(4)},
            r"layer\.weight_scale: must be torch\.float32 of shape \(\); got .*\(4,\)",
        ),
        (
            fp8() | {"weight_scale": torch.ones((), dtype=torch.float64)},
            r"weight_scale: must be torch\.float32 .*float64",
        ),
        (fp8() | {"weight_scale": torch.tensor(NAN)}, r"layer\.weight_scale: must be finite and not negative; got nan"),
        (fp8() | {"weight_scale": torch.tensor(-1.0)}, r"layer\.weight_scale: must be finite and not negative; got -1"),
        (
            fp8() | {"weight": torch.ones(4, 16).to(torch.float8_e4m3fn)},
            r"layer\.weight: must be .*\(4, 32\); got .*\(4, 16\)",
        ),
        (nvfp4() | {"weight_scale_2": None}, r"layer\.weight_scale_2: missing; layer\.weight is stored in NVFP4"),
        (
            nvfp4() | {"weight_scale": torch.ones(4, 2)},
            r"layer\.weight_scale: must be torch\.float8_e4m3fn of shape \(4, 2\)",
        ),
        (
            nvfp4() | {"weight_scale": torch.ones(4, 1).to(torch.float8_e4m3fn)},
            r"weight_scale: must .*\(4, 2\); .*\(4, 1\)",
        ),
        (
            nvfp4() | {"weight": torch.ones(4, 32, dtype=torch.uint8)},
            r"layer\.weight: must be torch\.uint8 of shape \(4, 16\)",
        ),
    ],
)
def test_a_part_that_does_not_fit_is_named(parts: dict[str, Tensor | None], message: str) -> None:
    given = {name: part for name, part in parts.items() if part is not None}
    with pytest.raises(CheckpointError, match=message):
        decode(NAME, given, torch.Size((4, 32)), torch.bfloat16)


@pytest.mark.parametrize("place", [(0, 0), (3, 1)])
def test_codes_and_scales_that_are_no_numbers_are_refused(place: tuple[int, int]) -> None:
    shape, rule = (
        torch.Size((4, 32)),
        r"^layer\.weight: must hold finite numbers of torch\.bfloat16; its {} codes give others$",
    )
    eight, four = fp8(), nvfp4()
    eight["weight"].view(torch.uint8)[place] = 0x7F
    four["weight_scale"].view(torch.uint8)[place] = 0xFF
    large = {"weight": torch.full((4, 32), 2.0).to(torch.float8_e4m3fn), "weight_scale": torch.tensor(3e38)}
    for parts, form in ((eight, "FP8"), (four, "NVFP4"), (large, "FP8")):
        with pytest.raises(CheckpointError, match=rule.format(form)):
            decode(NAME, parts, shape, torch.bfloat16)


def test_a_row_that_is_no_whole_number_of_blocks() -> None:
    with pytest.raises(CheckpointError, match=r"^layer\.weight: must have a multiple of 16 columns in NVFP4; got 24$"):
        decode(NAME, nvfp4(), torch.Size((4, 24)), torch.float32)


def test_what_is_no_matrix_is_not_quantised() -> None:
    parts = {"weight": torch.ones(4).to(torch.float8_e4m3fn), "weight_scale": torch.tensor(2.0)}
    with pytest.raises(CheckpointError, match=r"^layer\.weight: must not be quantised, being no matrix; got FP8$"):
        decode(NAME, parts, torch.Size((4,)), torch.bfloat16)


def test_float64_holds_the_value_itself() -> None:
    scale = torch.tensor(0.0123456789)
    got = decode_fp8(codes(list(range(127)), torch.float8_e4m3fn)[None], scale, torch.float64)
    assert got[0].tolist() == [e4m3(code) * scale.double().item() for code in range(127)]
