"""Shapes with a name: the published models, the papers' Transformer baseline, and small ones of ours.

Sources: arXiv:2504.03624, table 1 and section 2; the configs NVIDIA published with the checkpoints
(huggingface.co/nvidia/Nemotron-H-56B-Base-8K/blob/main/config.json and its siblings); for the 4B, 47B and Nano 2,
NVIDIA's Megatron-LM export scripts, which agree with NeMo's.
"""

from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.config.settings import nearest
from nemotron_h.errors import ConfigError

P8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
P56B = "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-"
P47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
P12B = "M-M-M-M*-" + "M-M-M-M*-" * 5 + "M-M-M-M-"
P9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
VOCABULARY = 131_072


def published(
    pattern: str, hidden: int, mlp: int, heads: int, mamba: MambaConfig, max_positions: int = 8192
) -> ModelConfig:
    """What all published members share: 8 key-value heads 128 wide, one vocabulary."""
    return ModelConfig.from_pattern(
        pattern,
        hidden_size=hidden,
        vocab_size=VOCABULARY,
        mamba=mamba,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=8, head_dim=128),
        mlp=MlpConfig(intermediate_size=mlp),
        max_positions=max_positions,
    )


def mamba(heads: int, width: int, state: int, groups: int = 8, chunk: int = 128) -> MambaConfig:
    return MambaConfig(num_heads=heads, head_dim=width, state_size=state, num_groups=groups, chunk_size=chunk)


def small(pattern: str, hidden: int, mlp: int, heads: int, kv_heads: int, ssm: MambaConfig, vocab: int) -> ModelConfig:
    return ModelConfig.from_pattern(
        pattern,
        hidden_size=hidden,
        vocab_size=vocab,
        mamba=ssm,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=64),
        mlp=MlpConfig(intermediate_size=mlp),
    )


PRESETS = {
    "4b": published(P8B, 3072, 12288, 32, mamba(112, 64, 128, chunk=256)),
    "8b": published(P8B, 4096, 21504, 32, mamba(128, 64, 128)),
    "47b": published(P47B, 8192, 30720, 64, mamba(256, 64, 256)),
    "56b": published(P56B, 8192, 32768, 64, mamba(256, 64, 256)),
    "nano-12b-v2": published(P12B, 5120, 20480, 40, mamba(128, 80, 128), max_positions=131_072),
    "nano-9b-v2": published(P9B, 4480, 15680, 40, mamba(128, 80, 128), max_positions=131_072),
    # The papers' baseline of the 8B's size and data. Its RoPE base is not published; 10,000 is ours.
    "t-8b": ModelConfig.from_pattern(
        "*-" * 32,
        hidden_size=4096,
        vocab_size=VOCABULARY,
        attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128, rope_base=10_000.0),
        mlp=MlpConfig(intermediate_size=21504),
    ),
    "3m": small("M-*-M-", 192, 768, 3, 1, mamba(6, 64, 64, groups=1), 4096),
    "25m": small("M-M-M*-M-M-M*-M-", 448, 1792, 7, 1, mamba(14, 64, 64, groups=2), 8192),
    "256m": small("M-M-M-M*-M-M-M-M-M*-M-M-", 1024, 4096, 16, 4, mamba(32, 64, 128), 32_000),
}


def preset(name: str) -> ModelConfig:
    """The shape of that name. Raises: ConfigError with the nearest name."""
    if name not in PRESETS:
        raise ConfigError(f"preset: must be one that exists; got {name!r}; {nearest(name, list(PRESETS))}")
    return PRESETS[name]
