"""How tokens are drawn from a model's logits."""

import math
from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

from nemotron_h.config.keys import as_number, short
from nemotron_h.config.settings import settings
from nemotron_h.errors import ConfigError

MOST_ID_DIGITS = 10  # of a token id, which has 32 bits


def bias_pairs(value: object) -> tuple[tuple[int, float], ...]:
    """(token id, bias) by rising id, from a mapping, whose keys JSON makes strings, or from pairs."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise ConfigError(f"logit_bias: must map token ids to numbers; got {short(value)}")
    biases: dict[int, float] = {}
    for key, bias in pairs:
        written = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= MOST_ID_DIGITS
        token, number = int(key) if written else key, as_number(bias)
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise ConfigError(f"logit_bias: must name tokens by ids of 0 or above; got {short(key)}")
        if number is None or not math.isfinite(number):
            raise ConfigError(f"logit_bias: must be finite numbers; got {short(bias)} for token {token}")
        if token in biases:
            raise ConfigError(f"logit_bias: must name each token once; got {token} twice")
        biases[token] = number
    return tuple(sorted(biases.items()))


@settings
class Sampling:
    """What is done with the logits, in this order; the defaults do nothing and take the likeliest token.

    Whatever the neighbours do, the same seed gives the same draws. temperature 0 takes the likeliest that the bias, the
    penalties and the request's hook leave: top_k, top_p, min_p and seed do not matter then.
    """

    logit_bias: Annotated[tuple[tuple[int, float], ...], BeforeValidator(bias_pairs), PlainSerializer(dict)] = ()
    repetition_penalty: float = 1.0  # of tokens in prompt or reply, once: divides logits above 0, multiplies the others
    frequency_penalty: float = 0.0  # subtracted for each time that the reply has the token
    presence_penalty: float = 0.0  # subtracted once where the reply has the token
    temperature: float = 0.0
    top_k: int = 0  # so many of the likeliest; 0: all
    top_p: float = 1.0  # the fewest of the likeliest that together have this probability
    min_p: float = 0.0  # those with at least this share of the likeliest's probability
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError(f"repetition_penalty: must be above 0; got {self.repetition_penalty}")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ConfigError(f"{name}: must lie in -2..2; got {getattr(self, name)}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature: must be 0 or above; got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k: must be 0 (all) or above; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: must lie above 0 and not above 1; got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise ConfigError(f"min_p: must be 0 or above, and below 1; got {self.min_p}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: must lie in 0..2^63-1; got {self.seed}")
