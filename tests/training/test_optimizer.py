"""What decays, what MUON moves, and the state by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nemotron_h.config.model import ModelConfig
from nemotron_h.config.train import Optimizer, TrainConfig
from nemotron_h.errors import CheckpointError
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.training.optimizer import load_state_tensors, optimizers, set_learning_rate, state_tensors

UNDECAYED = ("A_log", "D", "dt_bias", "conv1d.bias", "norm.weight", "norm_f.weight")


def chosen(optimizer: Optimizer) -> dict[str, Any]:
    rate = 0.02 if optimizer is Optimizer.MUON else None
    return {"optimizer": optimizer, "matrix_learning_rate": rate}


def built(config: ModelConfig) -> Hybrid:
    model = Hybrid(config)
    initialise(model, 0)
    return model


@pytest.mark.parametrize("optimizer", list(Optimizer))
def test_without_gradient_only_decay_moves(
    model_config: ModelConfig, settings: TrainConfig, optimizer: Optimizer
) -> None:
    model = built(model_config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = optimizers(model, replace(settings, **chosen(optimizer), weight_decay=0.25))
    set_learning_rate(made, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for one in made:
        one.step()
    moved = set()
    for name, parameter in model.named_parameters():
        muon = optimizer is Optimizer.MUON and "mixer" in name and parameter.ndim == 2
        rate = 0.5 * (0.02 if muon else settings.learning_rate)
        kept = 1.0 if name.endswith(UNDECAYED) else 1 - rate * 0.25
        torch.testing.assert_close(parameter.detach(), before[name] * kept, rtol=1e-6, atol=0)
        moved |= {name} if kept < 1 else set()
    assert {"lm_head.weight", "backbone.embeddings.weight", "backbone.layers.0.mixer.conv1d.weight"} <= moved


def test_the_embedding_may_have_a_rate_of_its_own(model_config: ModelConfig, settings: TrainConfig) -> None:
    model = built(model_config)
    made = optimizers(model, replace(settings, learning_rate=1e-3, embedding_learning_rate=0.05))
    set_learning_rate(made, 0.5)
    rates = {p: group["lr"] for one in made for group in one.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[parameter] == (0.025 if name == "backbone.embeddings.weight" else 5e-4), name


def test_newton_and_schulz_make_as_many_steps_as_they_are_told(
    model_config: ModelConfig, settings: TrainConfig
) -> None:
    for steps in (1, 4):
        _, muon = optimizers(
            built(model_config), replace(settings, **chosen(Optimizer.MUON), newton_schulz_steps=steps)
        )
        assert [group["ns_steps"] for group in muon.param_groups] == [steps]


def test_every_parameter_is_moved_once(model_config: ModelConfig, settings: TrainConfig) -> None:
    model = built(model_config)
    for optimizer in Optimizer:
        made = optimizers(model, replace(settings, **chosen(optimizer)))
        moved = [p for one in made for group in one.param_groups for p in group["params"]]
        assert len(moved) == len(set(moved)) == len(list(model.parameters()))
    names = {p: name for name, p in model.named_parameters()}
    muon = sorted(names[p].rpartition("mixer.")[2] for group in made[1].param_groups for p in group["params"])
    attention = [f"{letter}_proj.weight" for letter in "qkvo"]
    assert muon == sorted(
        [*attention, "in_proj.weight", "out_proj.weight", *["up_proj.weight", "down_proj.weight"] * 2]
    )


@pytest.mark.parametrize("optimizer", list(Optimizer))
def test_state_by_name_and_back(model_config: ModelConfig, settings: TrainConfig, optimizer: Optimizer) -> None:
    """Two steps at once equal a step, a copy through names, and a step."""
    config = replace(settings, **chosen(optimizer))
    generator = torch.Generator().manual_seed(1)
    model = built(model_config)
    gradients = [[torch.randn(p.shape, generator=generator) for p in model.parameters()] for _ in range(2)]

    def step(model: Hybrid, made: list[torch.optim.Optimizer], number: int) -> None:
        for parameter, gradient in zip(model.parameters(), gradients[number], strict=True):
            parameter.grad = gradient
        for one in made:
            one.step()

    made = optimizers(model, config)
    step(model, made, 0)
    other = built(model_config)
    other.load_state_dict(model.state_dict())
    again = optimizers(other, config)
    held = {name: tensor.clone() for name, tensor in state_tensors(model, made).items()}
    load_state_tensors(other, again, held, stepped=True)
    step(model, made, 1)
    step(other, again, 1)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_state_of_another_optimizer_is_refused(model_config: ModelConfig, settings: TrainConfig) -> None:
    model = built(model_config)
    made = optimizers(model, settings)
    with pytest.raises(CheckpointError, match=r"momentum_buffer.lm_head.weight: belongs to no parameter"):
        load_state_tensors(model, made, {"momentum_buffer.lm_head.weight": torch.zeros(3)}, stepped=False)
    with pytest.raises(CheckpointError, match=r"^step\..*: must have shape \(\); got none"):
        load_state_tensors(model, made, {}, stepped=True)
