import subprocess
import sys
from enum import StrEnum
from typing import Annotated, Any

import pytest

from nemotron_h.config.settings import Lenient, from_mapping, nearest, settings, to_mapping
from nemotron_h.config.train import Decay, TrainConfig
from nemotron_h.errors import ConfigError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@settings
class Inner:
    size: int
    colour: Annotated[Colour, Lenient] = Colour.RED

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"size: must be positive; got {self.size}")


@settings
class Outer:
    inner: Inner
    rate: float = 0.5
    names: Annotated[tuple[str, ...], Lenient] = ()


def test_plain_values_build_nested_settings() -> None:
    built = from_mapping(Outer, {"inner": {"size": 3, "colour": "blue"}, "rate": 1, "names": ["a", "b"]})
    assert built == Outer(inner=Inner(size=3, colour=Colour.BLUE), rate=1.0, names=("a", "b"))
    assert to_mapping(built) == {"inner": {"size": 3, "colour": "blue"}, "rate": 1.0, "names": ["a", "b"]}
    assert from_mapping(Outer, to_mapping(built)) == built


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"^inner: must be given; got nothing$"),
        ({"inner": {}}, r"^inner\.size: must be given; got nothing$"),
        ({"inner": {"size": "3"}}, r"^inner\.size: must be a valid integer; got '3'$"),
        ({"inner": {"size": True}}, r"^inner\.size: must be a valid integer; got True$"),
        ({"inner": {"size": 0}}, r"^inner\.size: must be positive; got 0$"),
        ({"inner": {"size": 1, "colour": "green"}}, r"^inner\.colour: must be 'red' or 'blue'; got 'green'$"),
        ({"inner": {"size": 1, "color": "red"}}, r"^inner\.color: unknown setting; did you mean colour\?$"),
        ({"inner": {"size": 1}, "xyz": 1}, r"^xyz: unknown setting; known: inner, rate, names$"),
        ({"inner": 3}, r"^inner: must be .*; got 3$"),
        ({"inner": {"size": 1}, "rate": "fast"}, r"^rate: must be a valid number; got 'fast'$"),
        ({"inner": {"size": 1}, "names": ["a", 2]}, r"^names\.1: must be a valid string; got 2$"),
    ],
)
def test_each_refusal_is_one_line_that_names_the_setting(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_mapping(Outer, values)
    assert "\n" not in str(caught.value)


def test_nearest() -> None:
    assert nearest("batch_sise", ["batch_size", "steps"]) == "did you mean batch_size?"
    assert nearest("zzz", ["batch_size", "steps"]) == "known: batch_size, steps"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"^steps: must be 1 or above; got 0$"),
        ({"validation_length": 0}, r"^validation_length: must be 1 or above; got 0$"),
        ({"newton_schulz_steps": 0}, r"^newton_schulz_steps: must be 1 or above; got 0$"),
        ({"newton_schulz_steps": 3}, r"^newton_schulz_steps: must be given only with 'muon'; got 3 with 'adamw'$"),
        ({"steps": 4, "decay": "stable", "decay_fraction": 0.1}, r"^decay_fraction: must be a step or more of 4"),
        ({"embedding_learning_rate": 0.0}, r"^embedding_learning_rate: must be above 0.* got 0"),
        ({"accumulation": 0}, r"^accumulation: must be 1 or above; got 0$"),
        ({"learning_rate": 0.0}, r"^learning_rate: must be above 0.* got 0"),
        ({"beta2": 1.0}, r"^beta2: must lie in 0\.\.1, 1 excluded; got 1"),
        ({"warmup_fraction": -0.1}, r"^warmup_fraction: must lie in 0\.\.1"),
        ({"decay_fraction": 0.995}, r"^decay_fraction: must leave room for warmup_fraction; got 0\.995 and 0\.01$"),
        ({"optimizer": "sgd"}, r"^optimizer: must be 'adamw' or 'muon'; got 'sgd'$"),
        ({"learning_rte": 0.1}, r"^learning_rte: unknown setting; did you mean learning_rate\?$"),
    ],
)
def test_training_settings_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**({"steps": 100} | values))


def test_held_out_windows_may_be_longer_than_those_of_training() -> None:
    config = TrainConfig(steps=1, sequence_length=64, batch_size=32)
    assert (config.held_out_length, config.held_out_batch) == (64, 32)
    config = TrainConfig(steps=1, sequence_length=64, batch_size=32, validation_length=512)
    assert (config.held_out_length, config.held_out_batch) == (512, 4)
    config = TrainConfig(steps=1, sequence_length=64, batch_size=2, validation_length=4096)
    assert config.held_out_batch == 1


def test_training_settings_in_tokens_and_steps() -> None:
    config = TrainConfig(
        steps=200, batch_size=4, accumulation=2, sequence_length=512, decay=Decay.STABLE, decay_fraction=0.2
    )
    assert (config.warmup_steps, config.decay_steps, config.step_tokens) == (2, 40, 4096)


def test_no_settings_import_torch() -> None:
    rooms = "cost, data, devices, model, pattern, presets, published, recipe, settings, tokenizer, train"
    program = f"import sys; from nemotron_h.config import {rooms}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
