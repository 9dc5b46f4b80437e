"""The learning rate as a function of the step: a factor of its peak.

    warm-up   (step + 1) / warmup
    cosine    final + (1 - final) (1 + cos(pi t)) / 2           t from 0 at the end of the warm-up to 1 at the last step
    stable    1, then 1 - (1 - final) t over the last decay_steps

Source: arXiv:2504.03624, section 2.4 (cosine to 1 %); arXiv:2508.14444 (warm-up-stable-decay).
"""

import math
from collections.abc import Callable

from nemotron_h.config.train import Decay, TrainConfig

Schedule = Callable[[int], float]  # step, from 0, to a factor of the peak learning rate


def schedule(config: TrainConfig) -> Schedule:
    """The schedule that the settings name."""
    last = config.steps - 1

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        falling_from = config.warmup_steps if config.decay is Decay.COSINE else config.steps - config.decay_steps
        t = (step - falling_from + 1) / max(1, last - falling_from + 1)
        if t <= 0:
            return 1.0
        curve = (1 + math.cos(math.pi * t)) / 2 if config.decay is Decay.COSINE else 1 - t
        return config.final_fraction + (1 - config.final_fraction) * curve

    return factor
