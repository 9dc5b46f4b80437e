from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from nemotron_h.model import linear as room
from nemotron_h.model.linear import linear, packed
from tests.compare import assert_near, seeded
from tests.model.shapes import FAMILY, model, random_tokens

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
    threads(count)
    weight, x = (torch.randn(rows, into, generator=seeded(0)).to(dtype) for rows in (out, 300))
    weight = laid_out(weight)
    whole = linear(x, weight)
    for rows, first in ((4, 1), (8, 3), (100, 5), (256, 7), (4, 100)):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY)
@torch.no_grad()
def test_a_packed_model_gives_the_plain_ones_logits(name: str, dtype: torch.dtype) -> None:
    net, tokens = deepcopy(model(name, dtype)), random_tokens(2, 130, seed=1)
    want = net(tokens)
    net.pack()
    got = net(tokens)
    if dtype == torch.bfloat16:
        assert torch.equal(got, want)
    assert_near(got, want, 1e-5)
    state = net.empty_state(2)
    pieces = [net(tokens[:, a:b], state) for a, b in ((0, 1), (1, 2), (2, 65), (65, 66), (66, 130))]
    assert torch.equal(torch.cat(pieces, dim=1), got)
