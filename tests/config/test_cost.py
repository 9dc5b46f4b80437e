import pytest

from nemotron_h.config import cost
from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig

CONFIG = ModelConfig.from_pattern(
    "M*-M",
    hidden_size=10,
    vocab_size=100,
    mamba=MambaConfig(num_heads=4, head_dim=3, state_size=5, num_groups=2),
    attention=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=8),
    mlp=MlpConfig(intermediate_size=11),
)


def test_parameters_counted_by_hand() -> None:
    # in_proj 10 x (12 + 12 + 20 + 4), conv 32 x 5, A_log D dt_bias 12, gated norm 12, out_proj 120, norm 10
    mamba = 480 + 160 + 12 + 12 + 120 + 10
    attention = 10 * 48 + 2 * 10 * 16 + 48 * 10 + 10
    want = {
        "Mamba-2": 2 * mamba,
        "attention": attention,
        "FFN": 2 * 110 + 10,
        "embedding": 1000,
        "head": 1000,
        "final norm": 10,
    }
    assert cost.parameters(CONFIG) == want
    assert cost.layer_parameters(CONFIG.layers[0], 10) == mamba


@pytest.mark.parametrize(("context", "blocks"), [(0, 0), (1, 1), (256, 1), (257, 2)])
def test_memory_counted_by_hand(context: int, blocks: int) -> None:
    memory = cost.memory(CONFIG, context, weight_bytes=2, batch=3)
    # boundary 12 x 5 float32; 64 places of x 12 and B 10 in bfloat16 and dt 4 in float32; 3 inputs of 32 channels
    state = 12 * 5 * 4 + 64 * (12 + 10) * 2 + 64 * 4 * 4 + 3 * 32 * 2
    assert memory["recurrent state"] == 3 * 2 * state
    assert memory["keys and values"] == 3 * 2 * 2 * 8 * 256 * blocks * 2
    total = sum(cost.parameters(CONFIG).values())
    assert memory["weights"] == (total - 24) * 2 + 24 * 4  # A_log, D and dt_bias stay float32
