from copy import deepcopy

import pytest
import torch

from nemotron_h.model import linear as layers
from nemotron_h.model.linear import Linear, QuantizedLinear
from nemotron_h.ops.linear import Blocks, FewRows
from nemotron_h.ops.rounding import nearest
from tests.model.shapes import FAMILY, model, random_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY)
@torch.no_grad()
def test_a_packed_model_gives_the_plain_ones_logits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, tokens = deepcopy(model(name, dtype)), random_tokens(2, 130, seed=1)
    want = net(tokens)
    with monkeypatch.context() as patched:
        exactly = lambda self, x: (x.double() @ self.weight.double().T).to(x.dtype)  # noqa: E731
        patched.setattr(Linear, "forward", exactly)
        exact = net(tokens)
    net.pack()
    got = net(tokens)
    if net.head_weight.is_mkldnn:
        assert torch.equal(got, want)
    far, plainly_far = ((logits - exact).double().pow(2).mean().sqrt().item() for logits in (got, want))
    # in bfloat16 both are exact but for products that come to lie on the other side of a tie, by chance
    assert far <= (2 * plainly_far if dtype == torch.float32 else 2**-8 * exact.abs().max().item())
    state = net.empty_state(2)
    pieces = [net(tokens[:, a:b], state) for a, b in ((0, 1), (1, 2), (2, 65), (65, 66), (66, 130))]
    assert torch.equal(torch.cat(pieces, dim=1), got)


def test_matrices_of_one_shape_are_tried_once_and_every_one_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = deepcopy(model("8b", torch.bfloat16))
    likes = []
    pack = Linear.pack
    monkeypatch.setattr(Linear, "pack", lambda self, like=None: (likes.append(like), pack(self, like)))
    net.pack()
    matrices = [module for module in net.modules() if isinstance(module, Linear)]
    assert len(likes) == len(matrices)
    assert sum(like is None for like in likes) == len({matrix.shape for matrix in matrices})
    assert not any(matrix.weight.requires_grad for matrix in matrices)


@pytest.mark.parametrize(("dtype", "blocks"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
@torch.no_grad()
def test_a_packed_matrix_that_is_replaced_or_copied_is_the_one_that_counts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *, blocks: bool
) -> None:
    if not blocks:
        monkeypatch.setattr(layers, "in_blocks", lambda _: None)
    first, second = (Linear(40, 70, dtype=dtype, device=torch.device("cpu")) for _ in range(2))
    for seed, one in enumerate((first, second)):
        torch.nn.init.normal_(one.weight, generator=torch.Generator().manual_seed(seed))
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    first.pack()
    copied = deepcopy(first)
    assert torch.equal(copied(x), first(x))
    assert type(copied.kernel) is type(first.kernel)
    if isinstance(copied.kernel, FewRows):
        assert copied.kernel.depth == first.kernel.depth
    if isinstance(copied.kernel, Blocks):
        copied.weight.zero_()
        assert not copied(x).any()
        assert first(x).any()
    first.weight = second.weight
    assert not first.packed
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_integers_that_are_replaced_or_copied_are_the_ones_that_count(bits: int) -> None:
    first, second = (
        QuantizedLinear.of(nearest(torch.randn(70, 40, generator=torch.Generator().manual_seed(seed)), bits), 8)
        for seed in range(2)
    )
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    before = first(x)
    copied = deepcopy(first)
    copied.get_parameter("scale").zero_()
    assert not copied(x).any()
    assert torch.equal(first(x), before)
    first.row_bits = torch.nn.Parameter(torch.tensor(16, dtype=torch.int32), requires_grad=False)
    assert first.rounded_to == 16
    assert not torch.equal(first(x), before)
    for name, parameter in second.named_parameters():
        setattr(first, name, parameter)
    assert torch.equal(first(x), second(x))
