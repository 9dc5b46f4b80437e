"""Against the tables of arXiv:2504.03624 and of the published configs."""

import pytest

from nemotron_h.config import cost
from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.config.presets import PRESETS, preset
from nemotron_h.errors import ConfigError

# name: parameters; Mamba, FFN, attention layers; where attention stands
PUBLISHED = {
    "4b": (4_489_223_040, (24, 24, 4), [7, 18, 29, 40]),
    "8b": (8_100_852_736, (24, 24, 4), [7, 18, 29, 40]),
    "47b": (46_791_554_816, (45, 48, 5), [17, 38, 49, 60, 86]),
    "56b": (56_324_350_464, (54, 54, 10), list(range(7, 107, 11))),
    "nano-12b-v2": (12_310_001_152, (28, 28, 6), [7, 16, 25, 34, 43, 52]),
    "nano-9b-v2": (8_888_227_328, (27, 25, 4), [14, 21, 30, 39]),
}
# name: d_inner, conv channels, in_proj rows; millions a Mamba, attention and FFN layer; billions in both tables
SIZES = {
    "4b": (7168, 9216, 16496, 72.75, 31.46, 75.50, 0.805),
    "8b": (8192, 10240, 18560, 109.64, 41.95, 176.16, 1.074),
    "47b": (16384, 20480, 37120, 438.43, 151.00, 503.32, 2.147),
    "56b": (16384, 20480, 37120, 438.43, 151.00, 536.88, 2.147),
    "nano-12b-v2": (10240, 12288, 22656, 168.50, 62.92, 209.72, 1.342),
    "nano-9b-v2": (10240, 12288, 22656, 147.45, 55.05, 140.50, 1.174),
}


def first(config: ModelConfig, kind: type) -> object:
    return next(layer for layer in config.layers if isinstance(layer, kind))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_layers_are_the_published_ones(name: str) -> None:
    total, (mamba, mlp, attention), places = PUBLISHED[name]
    config = PRESETS[name]
    assert sum(cost.parameters(config).values()) == total
    assert [config.pattern.count(letter) for letter in "M-*"] == [mamba, mlp, attention]
    assert [index for index, letter in enumerate(config.pattern) if letter == "*"] == places
    assert len(config.layers) == mamba + mlp + attention


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_layers_are_the_published_ones(name: str) -> None:
    inner, channels, rows, mamba_size, attention_size, mlp_size, tables = SIZES[name]
    config = PRESETS[name]
    mamba = first(config, MambaConfig)
    assert isinstance(mamba, MambaConfig)
    assert (mamba.inner_size, mamba.conv_channels) == (inner, channels)
    assert mamba.inner_size + mamba.conv_channels + mamba.num_heads == rows
    for kind, size in ((MambaConfig, mamba_size), (AttentionConfig, attention_size), (MlpConfig, mlp_size)):
        counted = cost.layer_parameters(first(config, kind), config.hidden_size)  # type: ignore[arg-type]
        assert round(counted / 1e6, 2) == size, kind.__name__
    counts = cost.parameters(config)
    assert round((counts["embedding"] + counts["head"]) / 1e9, 3) == tables


def test_what_makes_each_member_peculiar() -> None:
    heads = {name: first(PRESETS[name], AttentionConfig) for name in PUBLISHED}
    for name, attention in heads.items():
        assert isinstance(attention, AttentionConfig)
        assert (attention.head_dim, attention.num_kv_heads, attention.rope_base) == (128, 8, None), name
    assert PRESETS["4b"].hidden_size // 32 == 96
    assert PRESETS["nano-9b-v2"].hidden_size // 40 == 112
    mambas = {name: first(PRESETS[name], MambaConfig) for name in PUBLISHED}
    widths = {name: mamba.head_dim for name, mamba in mambas.items()}  # type: ignore[attr-defined]
    assert widths == {"4b": 64, "8b": 64, "47b": 64, "56b": 64, "nano-12b-v2": 80, "nano-9b-v2": 80}
    chunks = {name: mamba.chunk_size for name, mamba in mambas.items()}  # type: ignore[attr-defined]
    assert chunks == {name: 256 if name == "4b" else 128 for name in PUBLISHED}
    assert "MM" in PRESETS["47b"].pattern
    assert "---" in PRESETS["47b"].pattern


def test_the_transformer_baseline_is_of_the_8bs_size() -> None:
    config = PRESETS["t-8b"]
    assert config.pattern == "*-" * 32
    assert sum(cost.parameters(config).values()) / PUBLISHED["8b"][0] == pytest.approx(1, abs=0.01)
    assert first(config, AttentionConfig).rope_base == 10_000  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "millions"), [("25m", 25), ("256m", 256)])
def test_small_presets_are_as_large_as_their_names(name: str, millions: int) -> None:
    assert sum(cost.parameters(PRESETS[name]).values()) / 1e6 == pytest.approx(millions, rel=0.25)


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    assert preset("8b") is PRESETS["8b"]
    with pytest.raises(
        ConfigError, match=r"^preset: must be one that exists; got 'nano-12b'; did you mean nano-12b-v2\?"
    ):
        preset("nano-12b")
