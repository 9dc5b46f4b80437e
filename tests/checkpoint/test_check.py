"""A folder against itself, written again."""

from dataclasses import replace
from pathlib import Path

import pytest

from nemotron_h.checkpoint.check import config_again
from nemotron_h.config.keys import CONFIG_FILE
from nemotron_h.config.model import AttentionConfig, ModelConfig
from nemotron_h.config.published import write_config


@pytest.mark.parametrize(("rope_base", "number"), [(None, "2 dialects"), (10_000.0, "1 dialect")])
def test_a_config_is_written_in_every_dialect_that_has_it(
    rope_base: float | None, number: str, config: ModelConfig, tmp_path: Path
) -> None:
    """transformers has no model with RoPE."""
    layers = [
        replace(layer, rope_base=rope_base) if isinstance(layer, AttentionConfig) else layer for layer in config.layers
    ]
    write_config(replace(config, layers=tuple(layers)), tmp_path / CONFIG_FILE)
    finding = config_again(tmp_path)
    assert finding.holds
    assert finding.number == f"{number}, the same model"
