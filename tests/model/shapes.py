"""The family scaled down: each keeps what is peculiar to its member."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.inference.quantize import quantize
from nemotron_h.model.check import Arithmetic, find
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.model.linear import QuantizedLinear

VOCAB = 97
FOUND: dict[tuple[object, ...], Arithmetic] = {}


def scaled(
    pattern: str, hidden: int, mamba: MambaConfig | None, attention: AttentionConfig | None, mlp: int
) -> ModelConfig:
    return ModelConfig.from_pattern(
        pattern,
        hidden_size=hidden,
        vocab_size=VOCAB,
        mamba=mamba,
        attention=attention,
        mlp=MlpConfig(intermediate_size=mlp),
    )


def mamba(heads: int, width: int, state: int, groups: int = 2) -> MambaConfig:
    return MambaConfig(num_heads=heads, head_dim=width, state_size=state, num_groups=groups)


def attention(heads: int, kv_heads: int, width: int) -> AttentionConfig:
    return AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=width)


FAMILY = {
    "8b": scaled("M-M*-M-", 64, mamba(8, 16, 32), attention(4, 1, 16), 96),
    "4b": scaled("M*-M-", 48, mamba(6, 16, 32), attention(4, 2, 32), 64),  # attention wider than the stream
    "nano": scaled("M-MM-*-M-", 40, mamba(2, 80, 16), attention(5, 1, 16), 77),  # heads of 80, an odd FFN
    "47b": scaled("M-M*-M---MM-", 64, mamba(8, 16, 32, groups=8), attention(8, 2, 16), 80),
    "56b": scaled("M*-M-", 32, mamba(2, 16, 256), attention(4, 2, 8), 48),  # a state of 256
    "t-8b": scaled(
        "*-*-",
        48,
        None,
        AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, rope_base=10_000.0, rope_fraction=0.5),
        64,
    ),
    "ssm": scaled("M-M-", 48, mamba(4, 24, 16, groups=1), None, 64),
    "tied": replace(scaled("M*-", 48, mamba(4, 16, 16), attention(2, 2, 24), 64), tied_embeddings=True),
}


def model(name: str, dtype: torch.dtype = torch.float32) -> Hybrid:
    """A member with weights of a fixed seed, large enough that every layer matters. Not to be changed."""
    return as_engines_find_it(weighted(name, dtype))


@cache
def weighted(name: str, dtype: torch.dtype) -> Hybrid:
    built = Hybrid(FAMILY[name], dtype=dtype)
    initialise(built, seed=len(name))
    with torch.no_grad():
        for parameter_name, parameter in built.named_parameters():
            if parameter_name.endswith(("proj.weight", "lm_head.weight")):
                parameter.mul_(3)
    return built


def as_engines_find_it(model: Hybrid) -> Hybrid:
    """The model with the multiple of rows that keeps their bits on this machine and so many threads."""
    dtypes = model.backbone.embeddings.weight.dtype, model.compute_dtype
    key = model.config, *dtypes, model.takes_any_rows, torch.get_num_threads()
    if key not in FOUND:
        model.row_multiple = 4
        FOUND[key] = find(model)
    if not FOUND[key].holds:
        why = f"one arithmetic does not hold on this CPU at {key[-1]} threads: {FOUND[key].failures[-1]}"
        # what a CPU without products of bfloat16 does on several threads is its own; anything else is a fault of ours
        its_own = torch.bfloat16 in key and torch.get_num_threads() > 1 and not torch.cpu._is_avx512_bf16_supported()
        (pytest.skip if its_own else pytest.fail)(why)
    model.row_multiple = FOUND[key].multiple
    return model


def whole_blocks(*, tied: bool) -> ModelConfig:
    """Every matrix of a multiple of 64 outputs and inputs."""
    config = scaled("M*-", 64, mamba(64, 2, 16), attention(4, 2, 32), 128)
    return replace(config, vocab_size=128, tied_embeddings=tied)


def in_integers(model: Hybrid, precision: str) -> Hybrid:
    """The same model, its matrices in int8 or int4; every second meets rows in 16 bits."""
    generator = torch.Generator().manual_seed(0)
    quantize(model, precision, torch.randint(model.config.vocab_size, (1, 64), generator=generator))
    for place, (name, linear) in enumerate(model.matrices.items()):
        assert isinstance(linear, QuantizedLinear)
        model.put(name, QuantizedLinear.of(linear.matrix, 8 if place % 2 else 16))
    return model


def random_tokens(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))
