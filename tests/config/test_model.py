import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.config.presets import PRESETS
from nemotron_h.errors import ConfigError

MAMBA = {"num_heads": 8, "head_dim": 4, "state_size": 16, "num_groups": 2}
ATTENTION = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16}
MODEL = {"layers": (MlpConfig(intermediate_size=8),), "hidden_size": 32, "vocab_size": 100}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (MambaConfig, MAMBA | {"num_groups": 3}, r"^mamba\.num_groups: must divide num_heads; got 3 and 8$"),
        (MambaConfig, MAMBA | {"num_heads": 0}, r"^mamba\.num_heads: must be at least 1; got 0$"),
        (MambaConfig, MAMBA | {"state_size": -1}, r"^mamba\.state_size: must be at least 1; got -1$"),
        (MambaConfig, MAMBA | {"conv_kernel": 1}, r"^mamba\.conv_kernel: must be 2 or more; got 1$"),
        (MambaConfig, MAMBA | {"time_step_limit": (0.1, 0.1)}, r"^mamba\.time_step_limit: must be 0 <= low < high"),
        (MambaConfig, MAMBA | {"time_step_limit": (-1.0, 1.0)}, r"^mamba\.time_step_limit: must be 0 <= low < high"),
        (
            MambaConfig,
            MAMBA | {"time_step_limit": (0.0, math.nan)},
            r"^mamba\.time_step_limit: must be 0 <= low < high",
        ),
        (
            AttentionConfig,
            ATTENTION | {"num_kv_heads": 3},
            r"^attention\.num_kv_heads: must divide num_heads; got 3 and 8",
        ),
        (AttentionConfig, ATTENTION | {"head_dim": 0}, r"^attention\.head_dim: must be at least 1; got 0"),
        (AttentionConfig, ATTENTION | {"rope_base": 1.0}, r"^attention\.rope_base: must be above 1; got 1"),
        (
            AttentionConfig,
            ATTENTION | {"rope_base": 1e4, "rope_fraction": 0.0},
            r"^attention\.rope_fraction: must rotate an even number",
        ),
        (
            AttentionConfig,
            ATTENTION | {"rope_base": 1e4, "rope_fraction": 0.2},
            r"^attention\.rope_fraction: .* which rotates 3\.2$",
        ),
        (MlpConfig, {"intermediate_size": 0}, r"^mlp\.intermediate_size: must be at least 1; got 0$"),
        (ModelConfig, MODEL | {"layers": ()}, r"^layers: must hold at least one layer; got none$"),
        (ModelConfig, MODEL | {"hidden_size": 0}, r"^hidden_size: must be at least 1; got 0$"),
        (ModelConfig, MODEL | {"norm_epsilon": 0.0}, r"^norm_epsilon: must lie between 0 and 1; got 0"),
        (ModelConfig, MODEL | {"bos_token_id": 100}, r"^bos_token_id: must lie in 0\.\.vocab_size-1 = 99; got 100$"),
        (
            ModelConfig,
            MODEL | {"eos_token_ids": (2, -1)},
            r"^eos_token_ids: must lie in 0\.\.vocab_size-1 = 99; got -1$",
        ),
        (ModelConfig, MODEL | {"pad_token_id": 100}, r"^pad_token_id: must lie in"),
    ],
)
def test_a_value_that_breaks_a_rule_is_refused_by_name(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**values)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (MambaConfig, MAMBA | {"num_heads": "8"}, r"^num_heads: must be a valid integer; got '8'$"),
        (MambaConfig, MAMBA | {"num_heads": 8.0}, r"^num_heads: must be a valid integer; got 8\.0$"),
        (MambaConfig, MAMBA | {"num_heads": True}, r"^num_heads: must be a valid integer; got True$"),
        (ModelConfig, MODEL | {"tied_embeddings": 1}, r"^tied_embeddings: must be a valid boolean; got 1$"),
        (ModelConfig, MODEL | {"norm_epsilon": "1e-5"}, r"^norm_epsilon: must be a valid number; got '1e-5'$"),
        (ModelConfig, MODEL | {"hiden_size": 3}, r"^hiden_size: unknown setting; did you mean hidden_size\?$"),
        (ModelConfig, {"hidden_size": 3, "vocab_size": 3}, r"^layers: must be given; got nothing$"),
    ],
)
def test_types_are_strict(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        kind(**values)
    assert "\n" not in str(caught.value)


def test_a_list_may_fill_a_tuple() -> None:
    assert MambaConfig(**MAMBA, time_step_limit=[0.0, 0.5]).time_step_limit == (0.0, 0.5)  # type: ignore[arg-type]


def test_configs_are_values() -> None:
    config = MambaConfig(**MAMBA)
    with pytest.raises(FrozenInstanceError):
        config.num_heads = 4  # type: ignore[misc]
    assert config == MambaConfig(**MAMBA)
    assert hash(config) == hash(MambaConfig(**MAMBA))
    assert replace(config, head_dim=80).inner_size == 640
    with pytest.raises(ConfigError, match=r"^mamba\.num_groups: must divide"):
        replace(config, num_heads=7)


def test_derived_sizes() -> None:
    mamba = MambaConfig(**MAMBA)
    assert (mamba.inner_size, mamba.conv_channels) == (32, 96)
    assert AttentionConfig(**ATTENTION, rope_base=1e4, rope_fraction=0.5).rope_width == 8


@pytest.mark.parametrize("name", PRESETS)
def test_a_pattern_reads_back(name: str) -> None:
    config = PRESETS[name]
    kinds = {type(layer): layer for layer in config.layers}
    again = ModelConfig.from_pattern(
        config.pattern,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        mamba=kinds.get(MambaConfig),  # type: ignore[arg-type]
        attention=kinds.get(AttentionConfig),  # type: ignore[arg-type]
        mlp=kinds.get(MlpConfig),  # type: ignore[arg-type]
        max_positions=config.max_positions,
    )
    assert again == config


def test_a_pattern_needs_a_config_for_each_of_its_letters() -> None:
    with pytest.raises(ConfigError, match=r"^pattern: layer 1 is '\*', whose config must be given; got None$"):
        ModelConfig.from_pattern("M*", hidden_size=8, vocab_size=9, mamba=MambaConfig(**MAMBA))
    with pytest.raises(ConfigError, match=r"^hiden: unknown setting"):
        ModelConfig.from_pattern("M", hidden_size=8, vocab_size=9, mamba=MambaConfig(**MAMBA), hiden=3)


def test_layers_may_differ() -> None:
    wide, narrow = MlpConfig(intermediate_size=64), MlpConfig(intermediate_size=8)
    config = ModelConfig(layers=(wide, MambaConfig(**MAMBA), narrow), hidden_size=8, vocab_size=9)
    assert config.pattern == "-M-"
    assert config.layers[0] != config.layers[2]
