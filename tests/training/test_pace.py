"""The time left is measured, and said once."""

from dataclasses import replace

import pytest

from nemotron_h.config.train import TrainConfig
from nemotron_h.training import pace
from nemotron_h.training.pace import Pace, seconds_left

CONFIG = TrainConfig(steps=100, batch_size=2, accumulation=3, validate_every_steps=40, validation_windows=12)


def test_steps_validations_and_the_last_validation() -> None:
    # 70 steps of 6 s; validations at 40 and 80, of 9 windows; 9 more at the end; a window takes 6 / 6 / 3 s forward
    assert seconds_left(CONFIG, 30, 6.0, 9) == pytest.approx(70 * 6 + (2 * 9 + 9) / 3)
    assert seconds_left(CONFIG, 40, 6.0, 100) == pytest.approx(60 * 6 + (12 + 100) / 3)
    assert seconds_left(CONFIG, 30, 6.0, 0) == pytest.approx(70 * 6)
    longer = replace(CONFIG, validation_length=2 * CONFIG.sequence_length)
    assert seconds_left(longer, 30, 6.0, 9) == pytest.approx(70 * 6 + 2 * (2 * 9 + 9) / 3)


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def test_after_some_steps_without_the_first(clock: Clock) -> None:
    watched, said = Pace(CONFIG, 0), {}
    for step in range(1, 60):
        seconds = 70.0 if step == 1 else 0.25  # the first step compiles
        clock.now += seconds
        left = watched.add(step, seconds)
        if left is not None:
            said[step] = left
    assert said == {21: 79 * 0.25}


def test_after_some_seconds_on_a_slow_machine(clock: Clock) -> None:
    watched, said = Pace(CONFIG, 0), {}
    for step in range(41, 50):  # a run that was gone on with
        clock.now += 6.0
        left = watched.add(step, 6.0)
        if left is not None:
            said[step] = left
    assert said == {43: 57 * 6.0}
