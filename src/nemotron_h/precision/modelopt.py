"""FP8 and NVFP4 weights as NVIDIA's tool stores them, decoded exactly: the value in float64, rounded once.

    FP8     X.weight float8_e4m3fn (N, K)      X.weight_scale ()           value = code * scale
    NVFP4   X.weight uint8 (N, K / 2)          X.weight_scale float8_e4m3fn (N, K / 16)
            X.weight_scale_2 ()                value = code * its block's scale * scale_2

An NVFP4 byte holds two codes, the earlier in its low half; a code is E2M1: a sign, two bits of exponent, one more.
Scales without a shape are float32. No product needs more than 30 bits, so float64 holds it exactly.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nemotron_h.errors import CheckpointError

WEIGHT, SCALE, SCALE_2 = "weight", "weight_scale", "weight_scale_2"
PARTS = (WEIGHT, SCALE, SCALE_2)
OF_ACTIVATIONS, OF_CACHE = ("input_scale",), ("k_scale", "v_scale")  # scales of what is not quantised here
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the three low bits of a code; the fourth is the sign
BLOCK = 16  # codes that share a scale
AT_ONCE = 2**22  # elements decoded at a time: their float64 values take 32 MB


def format_of(codes: Tensor) -> str | None:
    """FP8 or NVFP4, by the dtype of the stored weight; None: the numbers are the weights."""
    return {torch.float8_e4m3fn: "FP8", torch.uint8: "NVFP4"}.get(codes.dtype)


def decode(name: str, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight of that name and shape (N, K), from its PARTS, in dtype, a plain float.

    Raises: CheckpointError naming the part that is missing or not as the format has it, or the weight where a number
    is none, or too large for dtype.
    """
    quantised = format_of(parts[WEIGHT])
    if len(shape) != 2:
        raise CheckpointError(f"{name}: must not be quantised, being no matrix; got {quantised}")
    rows, columns = shape
    stem = name.removesuffix(WEIGHT)
    global_part, wanted = (SCALE, {WEIGHT, SCALE}) if quantised == "FP8" else (SCALE_2, set(PARTS))
    for part in (*sorted(wanted - set(parts)), *sorted(set(parts) - wanted)):
        rule = "must not be there" if part in parts else "missing"
        raise CheckpointError(
            f"{stem}{part}: {rule}; {name} is stored in {quantised}, with {', '.join(sorted(wanted))}"
        )
    if quantised == "NVFP4" and columns % BLOCK:
        raise CheckpointError(f"{name}: must have a multiple of {BLOCK} columns in NVFP4; got {columns}")
    stored = (rows, columns) if quantised == "FP8" else (rows, columns // 2)
    check(name, parts[WEIGHT], stored, parts[WEIGHT].dtype)
    scale = parts[global_part]
    check(stem + global_part, scale.squeeze(), (), torch.float32)
    if not (scale.isfinite().all() and (scale >= 0).all()):
        raise CheckpointError(f"{stem}{global_part}: must be finite and not negative; got {scale.item()}")
    if quantised == "FP8":
        out = decode_fp8(parts[WEIGHT], scale.squeeze(), dtype)
    else:
        check(stem + SCALE, parts[SCALE], (rows, columns // BLOCK), torch.float8_e4m3fn)
        out = decode_nvfp4(parts[WEIGHT], parts[SCALE], scale.squeeze(), dtype)
    if not all(some.isfinite().all() for some in _portions(out)):
        raise CheckpointError(f"{name}: must hold finite numbers of {dtype}; its {quantised} codes give others")
    return out


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse a part of another shape or dtype."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise CheckpointError(
            f"{name}: must be {dtype} of shape {shape}; got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def decode_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (N, K) float8_e4m3fn, scale () float32 -> (N, K) in dtype."""
    out = torch.empty(codes.shape, dtype=dtype)
    for some, into in zip(_portions(codes), _portions(out), strict=True):
        into.copy_(rounded_once(some.double() * scale.double(), dtype))
    return out


def decode_nvfp4(codes: Tensor, scales: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (N, K / 2) uint8, scales (N, K / 16) float8_e4m3fn, scale () float32 -> (N, K) in dtype."""
    values = torch.tensor((*E2M1, *(-value for value in E2M1)), dtype=torch.float64)
    out = torch.empty(codes.shape[0], 2 * codes.shape[1], dtype=dtype)
    at_once = max(1, AT_ONCE // out.shape[1])
    for some, blocks, into in zip(codes.split(at_once), scales.split(at_once), out.split(at_once), strict=True):
        pair = torch.stack((some & 15, some >> 4), dim=-1)  # (n, K / 2, 2)
        blocked = values[pair.int()].view(len(some), -1, BLOCK)
        product = blocked * (blocks.double() * scale.double())[..., None]
        into.copy_(rounded_once(product.flatten(1), dtype))
    return out


def rounded_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values in dtype, to nearest, ties to even. torch goes by way of float32 and so rounds bfloat16 twice."""
    if dtype == torch.float64:
        return values
    near = values.float()
    if dtype == torch.float32:
        return near
    # to odd: of the two float32 neighbours of an inexact value the odd one, which keeps it off bfloat16's ties
    error = values - near.double()
    bits = near.view(torch.int32)
    step = torch.sign(error) * torch.sign(near) * (error != 0) * (bits % 2 == 0)
    return (bits + step.nan_to_num().int()).view(torch.float32).to(dtype)


def _portions(tensor: Tensor) -> tuple[Tensor, ...]:
    portions: tuple[Tensor, ...] = tensor.split(max(1, AT_ONCE // max(1, tensor.shape[1])))
    return portions
