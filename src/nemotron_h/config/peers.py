"""Transformers that the papers measure against, as shapes of equal cost, and what was published of them all.

A gated FFN of width w has three matrices, as many weights and FLOPs as one of ours of width 3 w / 2: so it is written
here. These shapes are for counting; none is a checkpoint's config. Sources: the models' own config.json; rates:
arXiv:2504.03624, figures 1 and 7, read off their markers.
"""

from dataclasses import dataclass

from nemotron_h.config.model import AttentionConfig, MlpConfig, ModelConfig
from nemotron_h.config.presets import PRESETS
from nemotron_h.config.settings import nearest
from nemotron_h.errors import ConfigError


def transformer(blocks: int, hidden: int, gated: int, heads: int, kv_heads: int, vocab: int) -> ModelConfig:
    """So many pairs of attention, its heads 128 wide, and an FFN as costly as a gated one of that width."""
    return ModelConfig.from_pattern(
        "*-" * blocks,
        hidden_size=hidden,
        vocab_size=vocab,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=128, rope_base=500_000.0),
        mlp=MlpConfig(intermediate_size=3 * gated // 2),
    )


PEERS = {
    "llama-3.1-8b": transformer(32, 4096, 14_336, 32, 8, 128_256),
    "llama-3.1-70b": transformer(80, 8192, 28_672, 64, 8, 128_256),
    "llama-3.1-405b": transformer(126, 16_384, 53_248, 128, 8, 128_256),
    "qwen-2.5-7b": transformer(28, 3584, 18_944, 28, 4, 152_064),
    "qwen-2.5-72b": transformer(80, 8192, 29_568, 64, 8, 152_064),
}


def shape(name: str) -> ModelConfig:
    """The shape of a preset or of a peer. Raises: ConfigError with the nearest name."""
    known = PRESETS | PEERS
    if name not in known:
        raise ConfigError(f"model: must be a preset or a peer; got {name!r}; {nearest(name, list(known))}")
    return known[name]


@dataclass(frozen=True)
class Published:
    """Output tokens per second and H100, of 65,536 tokens in and 1,024 out, and what ran it. Batch, precision and the
    number of devices are not published."""

    program: str
    tokens_per_second: float
    held: bool = True  # False: no roofline can match it, see PUBLISHED


# Not held: the T-8B and Llama-3.1-8B cost the same to the percent and were published 38 % apart; the 405B was measured
# at less than half of what its bytes and FLOPs leave the others. Both hold what a program did, not what hardware does.
PUBLISHED = {
    "8b": Published("megatron-lm", 210.9),
    "47b": Published("megatron-lm", 31.8),
    "56b": Published("megatron-lm", 25.6),
    "llama-3.1-8b": Published("vllm", 70.5),
    "qwen-2.5-7b": Published("vllm", 119.6),
    "qwen-2.5-72b": Published("vllm", 10.7),
    "llama-3.1-70b": Published("vllm", 10.8),
    "t-8b": Published("vllm", 97.0, held=False),
    "llama-3.1-405b": Published("vllm", 1.3, held=False),
}
PUBLISHED_INPUT_TOKENS, PUBLISHED_OUTPUT_TOKENS = 65_536, 1024
# pairs whose ratio the papers state
PUBLISHED_RATIOS = (
    ("8b", "qwen-2.5-7b"),
    ("8b", "llama-3.1-8b"),
    ("56b", "qwen-2.5-72b"),
    ("56b", "llama-3.1-70b"),
    ("47b", "qwen-2.5-72b"),
    ("47b", "56b"),
    ("8b", "t-8b"),
    ("56b", "llama-3.1-405b"),
)
