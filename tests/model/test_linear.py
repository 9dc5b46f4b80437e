from copy import deepcopy

import pytest
import torch

from nemotron_h.model.linear import Linear
from tests.compare import assert_near
from tests.model.shapes import FAMILY, model, random_tokens


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


def test_matrices_of_one_shape_are_tried_once_and_every_one_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = deepcopy(model("8b", torch.bfloat16))
    likes = []
    pack = Linear.pack
    monkeypatch.setattr(Linear, "pack", lambda self, like=None: (likes.append(like), pack(self, like)))
    net.pack()
    matrices = [module for module in net.modules() if isinstance(module, Linear)]
    assert len(likes) == len(matrices)
    assert sum(like is None for like in likes) == len({tuple(matrix.weight.shape) for matrix in matrices})
    assert not any(matrix.weight.requires_grad for matrix in matrices)
