"""A measurement as plain values, beside a peer's of the same run."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Row:
    """Medians of n runs that took turns. ratio: above 1 where ours is better. spread: the widest (largest - smallest) /
    median of the two. roof: what the machine would allow, where that is known. Without a peer there is none of its
    fields."""

    what: str
    unit: str
    ours: float
    n: int
    spread: float
    peer: float | None = None
    peer_version: str | None = None
    ratio: float | None = None
    roof: float | None = None


def row(
    what: str,
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float] = (),
    version: str | None = None,
    *,
    higher: bool,
    roof: float | None = None,
) -> Row:
    """Of runs that took turns. higher: more of the unit is better."""
    spread = max((max(runs) - min(runs)) / median(runs) for runs in (ours, peer) if runs)
    if not peer:
        return Row(what, unit, median(ours), len(ours), spread, roof=roof)
    ratio = median(ours) / median(peer) if higher else median(peer) / median(ours)
    return Row(what, unit, median(ours), len(ours), spread, median(peer), version, ratio, roof)
