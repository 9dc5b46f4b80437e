"""The learning rate against its formula, written another way."""

import math
from typing import Any

import pytest

from nemotron_h.config.train import Decay, Optimizer, TrainConfig
from nemotron_h.errors import ConfigError
from nemotron_h.training.schedule import schedule


@pytest.mark.parametrize("steps", [1, 2, 10, 97, 1000])
@pytest.mark.parametrize("decay", list(Decay))
def test_the_schedule_is_the_formula(steps: int, decay: Decay) -> None:
    fraction = 0.6 if decay is Decay.STABLE else None
    config = TrainConfig(steps=steps, warmup_fraction=0.1, decay=decay, decay_fraction=fraction)
    warmup, falling = round(steps * 0.1), round(steps * 0.6)
    factor = schedule(config)
    for step in range(steps):
        done = step + 1  # steps done once this one is
        if done <= warmup:
            wanted = done / warmup
        elif decay is Decay.COSINE:
            angle = math.pi * (done - warmup) / (steps - warmup)
            wanted = 0.01 + 0.99 * math.cos(angle / 2) ** 2
        else:
            wanted = min(1, 0.01 + 0.99 * (steps - done) / falling)
        assert factor(step) == pytest.approx(wanted, rel=1e-12), step
    assert factor(steps - 1) == pytest.approx(0.01, rel=1e-12)


@pytest.mark.parametrize("decay", list(Decay))
def test_up_to_the_peak_then_never_up_again(decay: Decay) -> None:
    fraction = 0.8 if decay is Decay.STABLE else None
    config = TrainConfig(steps=300, warmup_fraction=0.05, decay=decay, decay_fraction=fraction)
    values = [schedule(config)(step) for step in range(300)]
    top = values.index(max(values))
    assert values[top] == 1
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)


def test_fractions_leave_room() -> None:
    with pytest.raises(ConfigError, match=r"decay_fraction: must leave room for warmup_fraction; got 0.8 and 0.3"):
        TrainConfig(steps=10, warmup_fraction=0.3, decay=Decay.STABLE, decay_fraction=0.8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("clip_norm", 0.0),
        ("beta2", 1.0),
        ("seed", -1),
        ("final_fraction", math.nan),
        ("keep_checkpoints", 0),
    ],
)
def test_settings_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: must .*; got {value}"):
        TrainConfig(**{"steps": 10, name: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"decay_fraction": 0.2},
            "decay_fraction: must be given with 'stable', and only with it; got 0.2",
        ),
        ({"decay": Decay.STABLE}, "decay_fraction: must be given with 'stable'.*; got None with 'stable'"),
        ({"optimizer": Optimizer.MUON}, "matrix_learning_rate: must be given with 'muon'"),
        ({"matrix_learning_rate": 0.02}, "matrix_learning_rate: .*; got 0.02 with 'adamw'"),
    ],
)
def test_what_would_not_be_used_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}"):
        TrainConfig(steps=10, **changes)
