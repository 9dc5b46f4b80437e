from collections.abc import Callable

import pytest
import torch

from nemotron_h.model.linear import linear

# shapes whose plain product gives a row other bits at another place, on some number of threads
SHAPES = [(40, 77), (40, 4), (8, 134), (40, 110), (68, 10), (8, 25), (104, 14), (2, 113)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "into"), [*SHAPES, (40, 80), (97, 64)])
def test_a_rows_bits_depend_on_that_row_alone(
    out: int, into: int, dtype: torch.dtype, count: int, threads: Callable[[int], None]
) -> None:
    threads(count)
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, into, generator=generator).to(dtype) for rows in (out, 300))
    whole = linear(x, weight)
    for rows, first in ((4, 1), (8, 3), (100, 5), (256, 7), (4, 100)):
        assert torch.equal(linear(x[first : first + rows].clone(), weight), whole[first : first + rows])


def test_the_value_is_the_product_and_the_weight_is_cast() -> None:
    weight, x = torch.randn(5, 7), torch.randn(4, 7)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
    assert linear(x.bfloat16(), weight).dtype == torch.bfloat16
