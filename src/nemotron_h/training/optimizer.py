"""Which parameters an optimizer moves, which of them decay, and its state as named tensors.

Decayed: matrices (and the conv's taps). Not decayed: gains, biases, and the Mamba layers' A_log, D and dt_bias, whose
size says how long a layer remembers and nothing about overfitting. MUON takes the layers' matrices; embedding and head
stay with AdamW, their rows being looked up and not multiplied.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_h.config.train import Optimizer, TrainConfig
from nemotron_h.errors import CheckpointError

NEWTON_SCHULZ_STEPS = 5  # where the settings give none
EMBEDDING = "backbone.embeddings.weight"

# What each optimizer remembers of a parameter after its first step.
MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


def optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """One or two optimizers over all parameters, each group with its peak learning rate as `peak`."""
    named = list(model.named_parameters())
    matrices = [name for name, p in named if config.optimizer is Optimizer.MUON and orthogonalised(name, p)]
    rest = [(name, p) for name, p in named if name not in matrices]
    embedding, others = [p for name, p in rest if name == EMBEDDING], [pair for pair in rest if pair[0] != EMBEDDING]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in others if decayed(p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in others if not decayed(p)], "weight_decay": 0.0},
        {
            "params": embedding,
            "weight_decay": config.weight_decay,
            "lr": config.embedding_learning_rate or config.learning_rate,
        },
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
        assert config.matrix_learning_rate is not None  # MUON needs it
        parameters = dict(named)
        made.append(
            torch.optim.Muon(
                [parameters[name] for name in matrices],
                lr=config.matrix_learning_rate,
                weight_decay=config.weight_decay,
                ns_steps=config.newton_schulz_steps or NEWTON_SCHULZ_STEPS,
            )
        )
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def decayed(parameter: Tensor) -> bool:
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


def load_state_tensors(
    model: nn.Module, made: Iterable[torch.optim.Optimizer], tensors: Mapping[str, Tensor], *, stepped: bool
) -> None:
    """The inverse of `state_tensors`, which has nothing before the first step.

    Raises: CheckpointError where a tensor is missing, is of another shape, or belongs to no parameter.
    """
    names = {p: name for name, p in model.named_parameters()}
    unused = dict(tensors)
    for optimizer in made if stepped else ():
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            for moment in MOMENTS[type(optimizer)]:
                key = f"{moment}.{names[parameter]}"
                shape = () if moment == "step" else tuple(parameter.shape)
                value = unused.pop(key, None)
                if value is None or tuple(value.shape) != shape:
                    got = "none" if value is None else f"shape {tuple(value.shape)}"
                    raise CheckpointError(f"{key}: must have shape {shape}; got {got}; is the checkpoint damaged?")
                optimizer.state[parameter][moment] = value
    if unused:
        raise CheckpointError(f"{min(unused)}: belongs to no parameter of this run; is it of another optimizer?")
