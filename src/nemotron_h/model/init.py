"""First weights, as NVIDIA's Megatron-LM scripts set them for this family.

    matrices and embedding   N(0, 0.8 / hidden)              0.0099 for the 56B, 0.014 at hidden 4096
    output projections       N(0, 0.8 / hidden / layers)     o_proj, down_proj, out_proj; or zero, where that is asked
    conv                     U(-1, 1) / sqrt(kernel)         weight and bias
    A_log                    log U(1, 16)
    dt_bias                  softplus^-1 of dt, log-uniform in [0.001, 0.1], not under 0.0001
    D and gains              1

Source: NVIDIA/Megatron-LM, `megatron/core/ssm/mamba_mixer.py` and the scripts of the hybrid models.
"""

import math

import torch
from torch import Tensor, nn

from nemotron_h.model.hybrid import Hybrid

OUTPUT_PROJECTIONS = ("o_proj.weight", "down_proj.weight", "out_proj.weight")


def initialise(model: Hybrid, seed: int, *, zero_outputs: bool = False) -> None:
    """Fill every parameter in place. The same seed gives the same weights, whatever the dtype or device.

    zero_outputs: output projections are zero, so that every layer begins as the identity: a run of a few hundred steps
    learns faster from there.
    """
    generator = torch.Generator().manual_seed(seed)
    std = math.sqrt(0.8 / model.config.hidden_size)
    output_std = 0.0 if zero_outputs else std / math.sqrt(len(model.config.layers))
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        # a bias's bound follows from its weight's kernel
        shaped = parameters[name.replace("conv1d.bias", "conv1d.weight")]
        with torch.no_grad():
            parameter.copy_(_values(name, parameter, shaped.shape[-1], std, output_std, generator))


def _values(
    name: str, parameter: nn.Parameter, kernel: int, std: float, output_std: float, generator: torch.Generator
) -> Tensor:
    shape = parameter.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    match name.rpartition("mixer.")[2]:
        case "A_log":
            return uniform(1, 16).log()
        case "D":
            return torch.ones(shape)
        case "dt_bias":
            dt = uniform(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
            return dt + torch.log(-torch.expm1(-dt))
        case "conv1d.weight" | "conv1d.bias":
            return uniform(-1, 1) / math.sqrt(kernel)
        case output if output in OUTPUT_PROJECTIONS:
            return torch.randn(shape, generator=generator) * output_std
        case _ if len(shape) == 1:
            return torch.ones(shape)
        case _:
            return torch.randn(shape, generator=generator) * std
