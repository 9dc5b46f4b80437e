"""transformers' NemotronHForCausalLM, loaded from a folder that we save, gives our logits."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_h.checkpoint.save import save
from nemotron_h.config.model import MambaConfig, ModelConfig
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from tests.model.shapes import FAMILY, random_tokens

pytestmark = pytest.mark.parity

MEMBERS = ["8b", "4b", "nano", "47b", "56b"]


def floored(config: ModelConfig, floor: float) -> ModelConfig:
    """Time steps not under the floor: the CPU path of transformers clamps them at time_step_min, 0.001."""
    layers = [
        replace(layer, time_step_limit=(floor, math.inf)) if isinstance(layer, MambaConfig) else layer
        for layer in config.layers
    ]
    return replace(config, layers=tuple(layers))


def both(config: ModelConfig, tokens: Tensor, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (b, l, vocab): transformers', ours with its floor on the time steps, ours as the family is defined."""
    transformers: Any = pytest.importorskip("transformers")
    net = Hybrid(config)
    initialise(net, seed=7)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("proj.weight", "lm_head.weight")):
                parameter.mul_(3)
            if name.endswith("dt_bias"):
                parameter[::2] -= 6  # some heads' time steps lie below the floor
    save(net, folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers about itself: missing kernels, deprecated keys
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        peer = transformers.NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            theirs = peer.eval()(tokens, use_cache=False).logits
    clamped = Hybrid(floored(config, 0.001))
    clamped.load_state_dict(net.state_dict())
    with torch.no_grad():
        return theirs, clamped(tokens), net(tokens)


@pytest.mark.parametrize("length", [1, 65, 150])
@pytest.mark.parametrize("name", MEMBERS)
def test_logits_are_transformers_own(name: str, length: int, tmp_path: Path) -> None:
    theirs, ours, unclamped = both(FAMILY[name], random_tokens(2, length, seed=length), tmp_path / "model")
    far = (theirs - ours).abs().max() / theirs.abs().max()
    assert far < 2e-4  # float32 in another order through every layer
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))
    gap = ((theirs - unclamped).abs().max() / theirs.abs().max()).item()
    print(f"{name}, {length} tokens: {far:.1e} apart; the floor on time steps makes it {gap:.1e}")  # noqa: T201
    if length > 1:  # what one token alone adds, the gated norm takes away again
        assert gap > 100 * far
