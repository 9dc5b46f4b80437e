import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.config.model import ModelConfig
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from tests.model.shapes import FAMILY, attention, mamba, scaled

# wide enough for statistics: matrices of 10,000s, vectors of 512
WIDE = scaled("M-M*-", 128, mamba(512, 4, 64), attention(8, 4, 32), 512)


def filled(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    net = Hybrid(config, dtype=dtype)
    initialise(net, seed)
    return {name: p.detach() for name, p in net.named_parameters()}


def test_matrices_are_normal_with_the_papers_deviations() -> None:
    std, layers = math.sqrt(0.8 / 128), len(WIDE.layers)
    for name, value in filled(WIDE).items():
        if value.dim() != 2:
            continue
        output = name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight"))
        want = std / math.sqrt(layers) if output else std
        # n values: the deviation of a deviation is 1 / sqrt(2 n), of a mean 1 / sqrt(n); six of each
        n = value.numel()
        assert value.std().item() == pytest.approx(want, rel=6 / math.sqrt(2 * n)), name
        assert abs(value.mean().item()) < 6 * want / math.sqrt(n), name
        # kurtosis 3: normal, not uniform (1.8)
        assert (value / want).pow(4).mean().item() == pytest.approx(3, abs=6 * math.sqrt(96 / n)), name


def test_zero_outputs_make_every_layer_the_identity_and_change_nothing_else() -> None:
    usual, model = filled(WIDE), Hybrid(WIDE)
    initialise(model, 0, zero_outputs=True)
    for name, value in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):
            assert (value == 0).all(), name
        else:
            assert torch.equal(value, usual[name]), name
    tokens = torch.arange(20)[None]
    embedded = F.rms_norm(usual["backbone.embeddings.weight"][tokens], (128,), None, WIDE.norm_epsilon)
    torch.testing.assert_close(model(tokens), embedded @ usual["lm_head.weight"].T, rtol=0, atol=1e-5)


def test_the_deviation_is_nvidias_for_the_published_sizes() -> None:
    assert math.sqrt(0.8 / 8192) == pytest.approx(0.0099, abs=5e-5)
    assert math.sqrt(0.8 / 4096) == pytest.approx(0.014, abs=5e-5)


@pytest.mark.parametrize("layer", [0, 2])
def test_what_a_mamba_layer_starts_with(layer: int) -> None:
    values = filled(WIDE)
    own = {
        name.rpartition("mixer.")[2]: v for name, v in values.items() if name.startswith(f"backbone.layers.{layer}.")
    }
    rate = own["A_log"].exp()
    assert 1 <= rate.min() < 1.2
    assert 15.8 < rate.max() <= 16.0001
    assert rate.mean().item() == pytest.approx(8.5, abs=6 * 15 / math.sqrt(12 * 512))  # uniform, not log-uniform
    dt = F.softplus(own["dt_bias"].double())
    assert 1e-3 * 0.999 <= dt.min() < 1.1e-3
    assert 0.09 < dt.max() <= 0.1 * 1.001
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), abs=6 * math.log(100) / math.sqrt(12 * 512))
    assert (own["D"] == 1).all()
    assert (own["norm.weight"] == 1).all()
    for name in ("conv1d.weight", "conv1d.bias"):
        taps = own[name]
        assert 0.49 < taps.abs().max() <= 0.5, name
        assert taps.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.05), name
    assert own["A_log"].dtype == own["D"].dtype == own["dt_bias"].dtype == torch.float32


def test_gains_are_one_and_heads_differ() -> None:
    values = filled(WIDE)
    for name, value in values.items():
        if name.endswith(("norm.weight", "norm_f.weight")):
            assert (value == 1).all(), name
    assert not torch.equal(values["lm_head.weight"], values["backbone.embeddings.weight"])
    first, second = (values[f"backbone.layers.{i}.mixer.A_log"] for i in (0, 2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", FAMILY)
def test_a_seed_is_the_weights_whatever_the_dtype(name: str) -> None:
    wide, again = filled(FAMILY[name], seed=3), filled(FAMILY[name], seed=3)
    narrow, other = filled(FAMILY[name], seed=3, dtype=torch.bfloat16), filled(FAMILY[name], seed=4)
    for parameter, value in wide.items():
        assert torch.equal(value, again[parameter])
        assert torch.equal(value.to(narrow[parameter].dtype), narrow[parameter]), parameter
        if value.std() > 0:
            assert not torch.equal(value, other[parameter]), parameter


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    filled(FAMILY["8b"], seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tied_model_has_no_head_to_fill() -> None:
    assert "lm_head.weight" not in filled(replace(WIDE, tied_embeddings=True))
