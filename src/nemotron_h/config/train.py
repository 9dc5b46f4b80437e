"""Settings of a training run."""

import math
from enum import StrEnum
from typing import Annotated

from nemotron_h.config.settings import Lenient, settings
from nemotron_h.errors import ConfigError


class Decay(StrEnum):
    """How the learning rate falls after the warm-up."""

    COSINE = "cosine"  # along half a wave, over the whole run
    STABLE = "stable"  # warm-up-stable-decay: constant, then linear over the last decay_fraction


class Precision(StrEnum):
    """Of the products; the weights that are trained are float32 always."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Optimizer(StrEnum):
    ADAMW = "adamw"
    MUON = "muon"  # orthogonalised momentum for the layers' matrices, AdamW for the rest


@settings
class TrainConfig:
    """How many steps on what, and how each one moves the weights. Defaults: the 8B's where arXiv:2504.03624 has one."""

    steps: int
    sequence_length: int = 8192  # tokens
    batch_size: int = 8  # sequences in one pass
    accumulation: int = 1  # passes in one step
    learning_rate: float = 8e-4  # peak
    embedding_learning_rate: float | None = None  # peak for the embedding; None: as the rest
    final_fraction: float = 0.01  # of the peak, at the last step
    warmup_fraction: float = 0.01  # of the steps, from nothing to the peak
    decay: Annotated[Decay, Lenient] = Decay.COSINE
    decay_fraction: float | None = None  # of the steps: the falling end of STABLE, which needs it
    optimizer: Annotated[Optimizer, Lenient] = Optimizer.ADAMW
    matrix_learning_rate: float | None = None  # peak for what MUON moves, which needs it
    newton_schulz_steps: int | None = None  # of MUON, towards an orthogonal step; None: 5
    zero_outputs: bool = False  # every layer begins as the identity: its output projection is zero
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0  # of all gradients together
    precision: Annotated[Precision, Lenient] = Precision.BFLOAT16
    seed: int = 0
    validate_every_steps: int = 100
    validation_length: int | None = None  # tokens of a held-out window; None: sequence_length
    validation_windows: int = 64  # in between; the last validation reads everything
    checkpoint_every_steps: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in [
            "steps",
            "sequence_length",
            "batch_size",
            "accumulation",
            "newton_schulz_steps",
            "validate_every_steps",
            "validation_length",
            "validation_windows",
            "checkpoint_every_steps",
            "keep_checkpoints",
        ]:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: must be 1 or above; got {value}")
        for name in ("learning_rate", "embedding_learning_rate", "matrix_learning_rate", "epsilon", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}: must be above 0 and finite; got {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay: must be 0 or above, and finite; got {self.weight_decay}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: must lie in 0..2^63-1; got {self.seed}")
        for name in ("beta1", "beta2", "final_fraction", "warmup_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: must lie in 0..1, 1 excluded; got {getattr(self, name)}")
        if self.decay_fraction is not None and not 0 <= self.decay_fraction <= 1 - self.warmup_fraction:
            raise ConfigError(
                f"decay_fraction: must leave room for warmup_fraction; got {self.decay_fraction} and "
                f"{self.warmup_fraction}"
            )
        if self.decay_fraction and not self.decay_steps:
            raise ConfigError(f"decay_fraction: must be a step or more of {self.steps}; got {self.decay_fraction}")
        self._check_companions()

    def _check_companions(self) -> None:
        """Settings that steer one choice are given with that choice only."""
        for name, chosen, choice, needed in (
            ("decay_fraction", self.decay, Decay.STABLE, True),
            ("matrix_learning_rate", self.optimizer, Optimizer.MUON, True),
            ("newton_schulz_steps", self.optimizer, Optimizer.MUON, False),
        ):
            value = getattr(self, name)
            if (value is not None and chosen != choice) or (value is None and needed and chosen == choice):
                rule = (
                    f"given with {choice.value!r}, and only with it" if needed else f"given only with {choice.value!r}"
                )
                raise ConfigError(f"{name}: must be {rule}; got {value} with {chosen.value!r}")

    @property
    def warmup_steps(self) -> int:
        return round(self.steps * self.warmup_fraction)

    @property
    def decay_steps(self) -> int:
        return round(self.steps * (self.decay_fraction or 0))

    @property
    def held_out_length(self) -> int:
        """Tokens of a held-out window."""
        return self.validation_length or self.sequence_length

    @property
    def held_out_batch(self) -> int:
        """Held-out windows in one pass: about as many tokens as a pass of training has."""
        return max(1, self.batch_size * self.sequence_length // self.held_out_length)

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.accumulation * self.sequence_length
