import pytest
import torch

from nemotron_h.errors import ShapeError
from nemotron_h.ops.shapes import expect


def test_what_is_as_expected_passes() -> None:
    expect(torch.zeros(2, 3), "x", (2, 3))
    expect(torch.zeros(2, 3), "x", (2, 3), torch.float32)


def test_shape_and_dtype_are_named() -> None:
    with pytest.raises(ShapeError, match=r"^x: must have shape \(2, 4\); got \(2, 3\)$"):
        expect(torch.zeros(2, 3), "x", (2, 4))
    with pytest.raises(ShapeError, match=r"^x: must be torch\.bfloat16; got torch\.float32$"):
        expect(torch.zeros(2), "x", (2,), torch.bfloat16)
