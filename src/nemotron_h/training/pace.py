"""How long a run has still to go, measured on its own first steps."""

import time
from statistics import median

from nemotron_h.config.train import TrainConfig

SETTLED_STEPS = 20
SETTLED_SECONDS = 10.0
FORWARD_FRACTION = 1 / 3  # of a step's time: a step is a forward pass and a backward pass, which costs twice as much


class Pace:
    """Collects the seconds of steps and says once, when they have settled, how many are left."""

    def __init__(self, config: TrainConfig, held_out_windows: int) -> None:
        self.config, self.held_out_windows = config, held_out_windows
        self.step_seconds: list[float] | None = None  # None: the first step, which compiles kernels and is not counted
        self.began = 0.0
        self.said = False

    def add(self, step: int, seconds: float) -> float | None:
        """Seconds left after `step` steps of the run, once; None before and after that."""
        if self.step_seconds is None:
            self.step_seconds, self.began = [], time.perf_counter()
            return None
        self.step_seconds.append(seconds)
        settled = len(self.step_seconds) >= SETTLED_STEPS or time.perf_counter() - self.began >= SETTLED_SECONDS
        if self.said or not settled:
            return None
        self.said = True
        return seconds_left(self.config, step, median(self.step_seconds), self.held_out_windows)


def seconds_left(config: TrainConfig, step: int, step_seconds: float, held_out_windows: int) -> float:
    """The steps to come, the validations between them, and the one of all held-out windows at the end."""
    every = config.validate_every_steps
    validations = config.steps // every - step // every
    windows = validations * min(config.validation_windows, held_out_windows) + held_out_windows
    window_seconds = FORWARD_FRACTION * step_seconds * config.held_out_length / config.step_tokens
    return (config.steps - step) * step_seconds + windows * window_seconds
