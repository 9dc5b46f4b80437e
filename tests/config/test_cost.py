"""Against counts by hand, the papers' figures, and identities between the figures. FLOPs meet PyTorch's counter in
`tests/model/test_flops.py`."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_h.config import cost
from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.config.presets import PRESETS
from nemotron_h.errors import ConfigError

MIB, GIB = 2**20, 2**30
CONFIG = ModelConfig.from_pattern(
    "M*-M",
    hidden_size=10,
    vocab_size=100,
    mamba=MambaConfig(num_heads=4, head_dim=3, state_size=5, num_groups=2),
    attention=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=8),
    mlp=MlpConfig(intermediate_size=11),
)
# arXiv:2504.03624 and the published configs. Name: bytes of a token's keys and values in bfloat16; MiB of recurrent
# state in float32; MiB of conv inputs in bfloat16
CACHES = {
    "4b": (16_384, 84, 1.3),
    "8b": (16_384, 96, 1.4),
    "nano-12b-v2": (24_576, 140, 2.0),
    "nano-9b-v2": (16_384, 135, 1.9),
    "47b": (20_480, 720, 5.3),
    "56b": (40_960, 864, 6.3),
}


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


# numbers in vectors: five norms, two convs and gated norms; in A_log, D and dt_bias
VECTORS, RECURRENCE = 5 * 10 + 2 * (160 + 12), 2 * 12
# rows (4-bit codes, a 4-bit scale of each group of 16, each in whole bytes, a scale and a sum)
INT4 = 2 * (48 * (5 + 1 + 8) + 10 * (6 + 1 + 8)) + (48 + 2 * 16) * (5 + 1 + 8) + 10 * (24 + 2 + 8)
INT4 += 11 * (5 + 1 + 8) + 10 * (6 + 1 + 8)


@pytest.mark.parametrize(
    ("weights", "matrices", "head", "embedding", "vectors"),
    [  # matrices: 2700 weights in 227 rows of ten matrices
        ("float32", 4 * 2700, 4000, 4000, 4 * VECTORS + 4 * RECURRENCE),
        ("bfloat16", 2 * 2700, 2000, 2000, 2 * VECTORS + 4 * RECURRENCE),
        ("fp8", 2700 + 4 * 10, 2000, 2000, 2 * VECTORS + 4 * RECURRENCE),
        ("int8", 2700 + 8 * 227, 1000 + 8 * 100, 2000, 2 * VECTORS + 4 * RECURRENCE),
        ("int4", INT4, 1000 + 8 * 100, 2000, 2 * VECTORS + 4 * RECURRENCE),
        ("nvfp4", 1520, 563, 563, 222 + 14),  # nine sixteenths of the counts, each in whole bytes
    ],
)
def test_weights_counted_by_hand(weights: str, matrices: int, head: int, embedding: int, vectors: int) -> None:
    want = {"matrices": matrices, "head": head, "embedding": embedding, "vectors": vectors}
    assert cost.weight_bytes(CONFIG, weights) == want
    assert cost.weight_bytes(replace(CONFIG, tied_embeddings=True), weights) == want | (
        {} if "int" in weights else {"head": 0}
    )


def test_one_weight_takes_the_bits_of_its_format() -> None:
    """4 bits and a quarter, and 8 bits; both with eight bytes for each row, which are 4,096 wide on the whole."""
    config = PRESETS["8b"]
    count = cost.weight_bytes(config, "bfloat16")["matrices"] / 2
    assert cost.weight_bytes(config, "int4")["matrices"] * 8 / count == pytest.approx(4.25 + 64 / 4096, abs=0.005)
    assert cost.weight_bytes(config, "int8")["matrices"] * 8 / count == pytest.approx(8 + 32 / 4096, abs=0.005)


@pytest.mark.parametrize(("context", "blocks"), [(0, 0), (1, 1), (256, 1), (257, 2)])
@pytest.mark.parametrize(("weights", "width"), [("bfloat16", 2), ("float32", 4)])
def test_peak_counted_by_hand(weights: str, width: int, context: int, blocks: int) -> None:
    assert cost.peak_bytes(CONFIG, context, batch=3, weights=weights, buffers_bytes=7) == {
        "weights": sum(cost.weight_bytes(CONFIG, weights).values()),
        "keys and values": 3 * 2 * 2 * 8 * 256 * blocks * width,
        # two layers, three sequences: 12 x 5 float32; 64 places of x 12, B 10 and float32 dt 4; 3 inputs of 32
        # channels, and 15 more
        "recurrent state": 6 * 12 * 5 * 4,
        "chunk inputs": 6 * 64 * ((12 + 10) * width + 4 * 4),
        "conv inputs": 6 * 3 * 32 * width,
        "draft inputs": 6 * 15 * 32 * width,
        "buffers": 7,
    }


def test_fewer_bits_of_what_is_remembered() -> None:
    full, small = (
        cost.peak_bytes(CONFIG, 300, keys_values_bits=bits, state_bits=state) for bits, state in ((16, 32), (4, 16))
    )
    assert small == full | {
        "keys and values": full["keys and values"] // 4,
        "recurrent state": full["recurrent state"] // 2,
    }
    assert cost.peak_bytes(CONFIG, 300) == full


@pytest.mark.parametrize("name", CACHES)
def test_caches_are_the_published_ones(name: str) -> None:
    per_token, recurrent, conv = CACHES[name]
    config = PRESETS[name]
    assert [cost.token_bytes(config, bits) for bits in (16, 8, 4)] == [per_token, per_token // 2, per_token // 4]
    for context in (65_536, 131_072):
        assert cost.peak_bytes(config, context)["keys and values"] == per_token * context
    state = cost.state_bytes(config)
    assert state["recurrent state"] == recurrent * MIB
    assert cost.state_bytes(config, state_bits=16)["recurrent state"] == recurrent * MIB / 2
    assert round(state["conv inputs"] / MIB, 1) == conv


def test_the_papers_figures() -> None:
    # arXiv:2504.03624, section 4: 29.5 GiB of FP4 weights; its keys and values at a million tokens of context
    weights = sum(cost.weight_bytes(PRESETS["56b"], "nvfp4").values())
    assert round(weights / GIB, 2) == 29.51
    assert round(1_000_000 * cost.token_bytes(PRESETS["47b"], 4) / GIB, 2) == 4.77
    # arXiv:2508.14444: what the 9B needs at 131,072 tokens
    peak = cost.peak_bytes(PRESETS["nano-9b-v2"], 131_072)
    figures = [round(peak[term] / GIB, 2) for term in ("weights", "keys and values", "recurrent state")]
    assert figures == [16.56, 2.00, 0.13]
    assert sum(peak.values()) < 19.66 * GIB  # the budget that the 9B was made for


def test_flops_counted_by_hand() -> None:
    # products with weights; then the conv, C B^T against a chunk, its product with x, and the state read and written
    mamba = 2 * (480 + 120) + 2 * (4 * 32 + 2 * 64 * 5 + 64 * 12 + 12 * 5 + 12 * 5)
    attention = 2 * (2 * 480 + 2 * 160)  # and for each key two products 8 wide of 6 heads
    want = {"Mamba-2": 2 * mamba, "attention": attention + 2 * 2 * 48 * 100, "FFN": 2 * 220, "head": 2 * 1000}
    assert cost.decode_flops(CONFIG, 99) == want
    want["attention"] = attention + 2 * 2 * 48 * 50.5
    assert cost.prefill_flops(CONFIG, 100) == want | {"head": 20}
    assert cost.training_flops(CONFIG, 100) == {kind: 3 * flops for kind, flops in want.items()}


configs = st.builds(
    lambda pattern, groups, heads, width: ModelConfig.from_pattern(
        pattern,
        hidden_size=24,
        vocab_size=50,
        mamba=MambaConfig(num_heads=groups * heads, head_dim=width, state_size=16, num_groups=groups),
        attention=AttentionConfig(num_heads=groups * heads, num_kv_heads=groups, head_dim=width),
        mlp=MlpConfig(intermediate_size=width),
    ),
    st.text("M*-", min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 40),
)


@given(config=configs, context=st.integers(1, 200))
def test_a_prompt_read_is_its_tokens_generated(config: ModelConfig, context: int) -> None:
    one_by_one = [cost.decode_flops(config, before) for before in range(context)]
    for kind, flops in cost.prefill_flops(config, context).items():
        if kind != "head":  # which a prompt needs once
            assert context * flops == pytest.approx(sum(step[kind] for step in one_by_one), rel=1e-12)


@given(config=configs, context=st.integers(1, 5000), batch=st.integers(1, 9))
def test_sequences_add_up_and_the_state_does_not_grow(config: ModelConfig, context: int, batch: int) -> None:
    alone, many = (cost.peak_bytes(config, context, batch=size) for size in (1, batch))
    assert many == {term: size if term == "weights" else batch * size for term, size in alone.items()}
    longer = cost.peak_bytes(config, context + 256)
    page = 256 * cost.token_bytes(config)
    assert longer == alone | {"keys and values": alone["keys and values"] + page}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: cost.weight_bytes(CONFIG, "bf16"), "weights: must be a known format; got 'bf16'; "),
        (lambda: cost.token_bytes(CONFIG, 5), "keys_values_bits: must be one of 32, 16, 8, 4; got 5"),
        (lambda: cost.state_bytes(CONFIG, state_bits=8), "state_bits: must be one of 32, 16; got 8"),
        (lambda: cost.state_bytes(CONFIG, input_bits=8), "input_bits: must be one of 32, 16; got 8"),
        (lambda: cost.peak_bytes(CONFIG, -1), "context_tokens: must be at least 0; got -1"),
        (lambda: cost.peak_bytes(CONFIG, 1, batch=0), "batch: must be at least 1; got 0"),
        (lambda: cost.peak_bytes(CONFIG, 1, buffers_bytes=-1), "buffers_bytes: must be at least 0; got -1"),
        (lambda: cost.prefill_flops(CONFIG, 0), "context_tokens: must be at least 1; got 0"),
        (lambda: cost.training_flops(CONFIG, 0), "context_tokens: must be at least 1; got 0"),
        (lambda: cost.decode_flops(CONFIG, -1), "context_tokens: must be at least 0; got -1"),
    ],
)
def test_a_refusal_names_the_argument(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ask()
    assert str(refused.value).startswith(message)
