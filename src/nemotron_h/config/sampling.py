"""How tokens are drawn from a model's logits."""

import math

from nemotron_h.config.settings import settings
from nemotron_h.errors import ConfigError


@settings
class Sampling:
    """Temperature, then top-k, then top-p. temperature 0 takes the likeliest token, whatever the rest says.

    top_k 0 and top_p 1 leave all tokens in. The same seed gives the same draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature: must be 0 or above; got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k: must be 0 (all) or above; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: must lie above 0 and not above 1; got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: must lie in 0..2^63-1; got {self.seed}")
