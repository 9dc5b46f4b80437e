"""Confidence intervals of shares."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # of a normal distribution, both tails together 5 %


def wilson(share: float, count: int, z: float = Z95) -> tuple[float, float]:
    """Of a share of count trials: Wilson's, which holds at 0 and 1 and for few trials (Wilson 1927).

    Scores between 0 and 1 may be given as their mean: their variance is that of a share at most, so the interval is
    wide enough.
    """
    if count == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean(scores: Sequence[float]) -> float:
    return math.fsum(scores) / len(scores)
