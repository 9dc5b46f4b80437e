"""What a model costs, from its config alone: parameters by kind and bytes by context.

State of a sequence = for each Mamba layer the float32 state at the last chunk boundary, the inputs of the unfinished
chunk (x and B in the model's dtype, dt in float32) and the last conv inputs; for each attention layer its keys and
values, whose pages are whole blocks.
"""

from collections import Counter

from nemotron_h.config.model import AttentionConfig, LayerConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.config.pattern import NAMES
from nemotron_h.grid import BLOCK, CHUNK, round_up

FLOAT32_BYTES = 4


def layer_parameters(layer: LayerConfig, hidden_size: int) -> int:
    """Parameters of one layer, its norm included."""
    match layer:
        case MambaConfig():
            projected = 2 * layer.inner_size + 2 * layer.num_groups * layer.state_size + layer.num_heads
            conv = layer.conv_channels * (layer.conv_kernel + 1)
            mixer = hidden_size * projected + conv + 3 * layer.num_heads + layer.inner_size * (1 + hidden_size)
        case AttentionConfig():
            mixer = 2 * hidden_size * layer.head_dim * (layer.num_heads + layer.num_kv_heads)
        case MlpConfig():
            mixer = 2 * hidden_size * layer.intermediate_size
    return mixer + hidden_size


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by kind; their sum is the model's."""
    counts: Counter[str] = Counter()
    for letter, layer in zip(config.pattern, config.layers, strict=True):
        counts[NAMES[letter]] += layer_parameters(layer, config.hidden_size)
    table = config.vocab_size * config.hidden_size
    counts["embedding"] = table
    counts["head"] = 0 if config.tied_embeddings else table
    counts["final norm"] = config.hidden_size
    return dict(counts)


def memory(config: ModelConfig, context_tokens: int, *, weight_bytes: int = 2, batch: int = 1) -> dict[str, int]:
    """Bytes by term for sequences of context_tokens each: weights, keys and values, recurrent states.

    weight_bytes: of one weight, one key and one x of a chunk (2: bfloat16). Buffers of a step are not in it.
    """
    fixed = sum(3 * layer.num_heads for layer in config.layers if isinstance(layer, MambaConfig))
    weights = sum(parameters(config).values())
    keys_values = sum(
        2 * layer.num_kv_heads * layer.head_dim * round_up(context_tokens, BLOCK) * weight_bytes
        for layer in config.layers
        if isinstance(layer, AttentionConfig)
    )
    state = sum(mamba_state_bytes(layer, weight_bytes) for layer in config.layers if isinstance(layer, MambaConfig))
    return {
        "weights": (weights - fixed) * weight_bytes + fixed * FLOAT32_BYTES,
        "keys and values": batch * keys_values,
        "recurrent state": batch * state,
    }


def mamba_state_bytes(layer: MambaConfig, input_bytes: int) -> int:
    """One sequence, one layer: state at the boundary, inputs of a chunk, conv inputs."""
    boundary = layer.inner_size * layer.state_size * FLOAT32_BYTES
    inputs = CHUNK * (layer.inner_size + layer.num_groups * layer.state_size) * input_bytes
    steps = CHUNK * layer.num_heads * FLOAT32_BYTES
    return boundary + inputs + steps + (layer.conv_kernel - 1) * layer.conv_channels * input_bytes
