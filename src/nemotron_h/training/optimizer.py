"""Which parameters an optimizer moves, which of them decay, and its state as named tensors.

Decayed: matrices (and the conv's taps). Not decayed: gains, biases, and the Mamba layers' A_log, D and dt_bias, whose
size says how long a layer remembers and nothing about overfitting. MUON takes the layers' matrices; embedding and head
stay with AdamW, their rows being looked up and not multiplied.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from nemotron_h.config.train import Optimizer, TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer")


def optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """One or two optimizers over all parameters, each group with its peak learning rate as `peak`."""
    named = list(model.named_parameters())
    matrices = [name for name, p in named if config.optimizer is Optimizer.MUON and orthogonalised(name, p)]
    rest = [(name, p) for name, p in named if name not in matrices]
    groups = [
        {"params": [p for name, p in rest if decayed(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in rest if not decayed(name, p)], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        foreach=True,
    )
    made: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        parameters = dict(named)
        made.append(
            torch.optim.Muon(
                [parameters[name] for name in matrices],
                lr=config.matrix_learning_rate,
                weight_decay=config.weight_decay,
            )
        )
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def decayed(name: str, parameter: Tensor) -> bool:
    """Does weight decay pull on it?"""
    return parameter.ndim > 1


def orthogonalised(name: str, parameter: Tensor) -> bool:
    """Is it a matrix of a layer?"""
    return parameter.ndim == 2 and ".mixer." in name


def set_learning_rate(made: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Every group at this factor of its peak."""
    for optimizer in made:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def state_tensors(model: nn.Module, made: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything the optimizers remember, by parameter name: `exp_avg.backbone.norm_f.weight`."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{moment}.{names[p]}": value
        for optimizer in made
        for p, state in optimizer.state.items()
        for moment, value in state.items()
    }


def load_state_tensors(model: nn.Module, made: Iterable[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `state_tensors`: tensors of other names are passed over."""
    parameters = dict(model.named_parameters())
    owners = {p: optimizer for optimizer in made for group in optimizer.param_groups for p in group["params"]}
    for key, value in tensors.items():
        moment, _, name = key.partition(".")
        if moment in MOMENTS and name in parameters:
            parameter = parameters[name]
            owners[parameter].state[parameter][moment] = value
