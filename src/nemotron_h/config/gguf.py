"""The keys of a GGUF file that describe a model, as llama.cpp reads them for its architecture `nemotron_h`.

A layer's kind is read off two lists, one number a layer: the heads of keys and values, and the feed-forward width.
Attention has the first, a feed-forward layer the second, a Mamba layer neither. All layers of a kind have one size, as
in config.json. Format: llama.cpp's `src/llama-model.cpp` and `src/models/nemotron-h.cpp`.
"""

import math
from collections.abc import Mapping
from enum import StrEnum

from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.config.published import only
from nemotron_h.errors import UnsupportedError

ARCHITECTURE = "nemotron_h"
MOST_LAYERS = 512  # llama.cpp's own limit

GgufValue = str | bool | int | float | list[int] | list[str]


class GgufType(StrEnum):
    """How a GGUF file stores its matrices; embedding and head are in q8_0 in both of the last two."""

    BF16 = "bf16"
    Q8_0 = "q8_0"  # 8 bits, and a float16 scale for each 32 of a row
    Q4_0 = "q4_0"  # 4 bits, likewise


def to_gguf(config: ModelConfig) -> Mapping[str, GgufValue]:
    """The keys of a model.

    Raises: UnsupportedError naming what llama.cpp has no key for: it would compute another model.
    """
    mamba, attention = check_representable(config)
    kv_heads = [layer.num_kv_heads if isinstance(layer, AttentionConfig) else 0 for layer in config.layers]
    widths = [layer.intermediate_size if isinstance(layer, MlpConfig) else 0 for layer in config.layers]
    values: dict[str, GgufValue] = {
        "block_count": len(config.layers),
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        "feed_forward_length": widths,
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_epsilon": config.norm_epsilon,  # must be there; no norm of ours is of that kind
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "ssm.conv_kernel": mamba.conv_kernel,
        "ssm.inner_size": mamba.inner_size,
        "ssm.state_size": mamba.state_size,
        "ssm.time_step_rank": mamba.num_heads,
        "ssm.group_count": mamba.num_groups,
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}


def check_representable(config: ModelConfig) -> tuple[MambaConfig, AttentionConfig]:
    """Refuse what llama.cpp does not compute in this architecture. Returns: what its layers have in common."""
    if len(config.layers) > MOST_LAYERS:
        raise UnsupportedError(f"layers: must be at most {MOST_LAYERS} for llama.cpp; got {len(config.layers)}")
    mamba, attention = only(config, MambaConfig), only(config, AttentionConfig)
    if mamba is None or attention is None:  # it stops at the first token
        lacking = "Mamba" if mamba is None else "attention"
        raise UnsupportedError(
            f"layers: must hold Mamba and attention for llama.cpp's {ARCHITECTURE}; got no {lacking} layer in "
            f"{config.pattern}; llama.cpp cannot run this model"
        )
    if attention.rope_base is not None:
        raise UnsupportedError(
            f"attention.rope_base: must be None for llama.cpp's {ARCHITECTURE}, which has no position embedding; "
            f"got {attention.rope_base:g}; llama.cpp cannot run this model"
        )
    if mamba.time_step_limit != (0, math.inf):
        raise UnsupportedError(
            f"mamba.time_step_limit: must be (0, inf) for llama.cpp, which clamps no time step; "
            f"got {mamba.time_step_limit}; llama.cpp cannot run this model"
        )
    return mamba, attention
