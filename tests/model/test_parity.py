"""transformers' NemotronHForCausalLM, loaded from a folder that we save, gives our logits."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_h.checkpoint.load import load
from nemotron_h.checkpoint.save import save
from nemotron_h.config.model import MambaConfig, ModelConfig
from nemotron_h.config.published import Dialect
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.model.mamba import Mamba
from tests.compare import assert_near
from tests.model.reference import float64_weights, reference_logits
from tests.model.shapes import FAMILY, random_tokens
from tests.model.shapes import model as member

pytestmark = pytest.mark.parity

MEMBERS = ["8b", "4b", "nano", "47b", "56b"]


def floored(config: ModelConfig, floor: float) -> ModelConfig:
    """Time steps not under the floor: the CPU path of transformers clamps them at time_step_min, 0.001."""
    layers = [
        replace(layer, time_step_limit=(floor, math.inf)) if isinstance(layer, MambaConfig) else layer
        for layer in config.layers
    ]
    return replace(config, layers=tuple(layers))


def peer_of(folder: Path) -> Any:
    """transformers' model of a folder, in float32."""
    transformers: Any = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers about itself: missing kernels, deprecated keys
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        return transformers.NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def both(config: ModelConfig, tokens: Tensor, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (b, l, vocab): transformers', ours with its floor on the time steps, ours as the family is defined."""
    net = Hybrid(config)
    initialise(net, seed=7)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("proj.weight", "lm_head.weight")):
                parameter.mul_(3)
            if name.endswith("dt_bias"):
                parameter[::2] -= 6  # some heads' time steps lie below the floor
    save(net, folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = peer_of(folder)(tokens, use_cache=False).logits
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


READ, WRITTEN = 70, 6


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """A model this small only waits for a second thread, most of all on a busy machine."""
    threads(1)


def fair(name: str) -> Hybrid:
    """A member whose time steps lie above the floor that transformers puts under them, in prefill alone."""
    net = Hybrid(FAMILY[name])
    net.load_state_dict(member(name).state_dict())
    with torch.no_grad():
        for layer in net.backbone.layers:
            if isinstance(layer.mixer, Mamba):
                layer.mixer.in_proj.weight[-len(layer.mixer.dt_bias) :] /= 8
                layer.mixer.dt_bias += 3
    return net.eval()


def ours_in_two_parts(net: Hybrid, tokens: Tensor) -> tuple[Tensor, Tensor]:
    state = net.empty_state(len(tokens))
    prefill = net(tokens[:, :READ], state)
    return prefill, torch.cat([net(tokens[:, t : t + 1], state) for t in range(READ, READ + WRITTEN)], dim=1)


def theirs_in_two_parts(peer: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    first = peer(tokens[:, :READ], use_cache=True)
    cache, steps = first.past_key_values, []
    for t in range(READ, READ + WRITTEN):
        step = peer(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        steps.append(step.logits)
    return first.logits, torch.cat(steps, dim=1)


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("name", [*MEMBERS, "tied"])
@torch.no_grad()
def test_both_dialects_give_the_definitions_logits(name: str, dialect: Dialect, tmp_path: Path) -> None:
    """Ours, transformers' from a folder in either dialect, and the float64 definition: prefill and decode apart."""
    net, tokens = fair(name), random_tokens(2, READ + WRITTEN, seed=3)
    save(net, tmp_path / "m", dialect=dialect, dtype=torch.float32)
    weights = {key: weight.detach() for key, weight in float64_weights(net).items()}
    want = torch.stack([reference_logits(net.config, weights, row) for row in tokens])
    assert torch.equal(want[0], reference_logits(floored(net.config, 0.001), weights, tokens[0]))  # it is fair
    ours = ours_in_two_parts(load(tmp_path / "m", dtype=torch.float32), tokens)
    theirs = theirs_in_two_parts(peer_of(tmp_path / "m"), tokens)
    for who, (prefill, decode) in {"ours": ours, "transformers": theirs}.items():
        assert_near(prefill.double(), want[:, :READ], 2e-4, f"{who}, prefill")  # float32 through every layer
        assert_near(decode.double(), want[:, READ:], 2e-4, f"{who}, decode")


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("name", MEMBERS)
@torch.no_grad()
def test_what_transformers_saves_loads_here(name: str, original: bool, tmp_path: Path) -> None:
    """original: under the names that the folder it was loaded from had."""
    net, tokens = fair(name), random_tokens(1, 40, seed=4)
    save(net, tmp_path / "m", dtype=torch.float32)
    peer_of(tmp_path / "m").save_pretrained(tmp_path / "theirs", save_original_format=original)
    loaded = load(tmp_path / "theirs", dtype=torch.float32)
    assert loaded.config == net.config
    assert torch.equal(loaded(tokens), net(tokens))
