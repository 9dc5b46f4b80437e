"""Drafts: what followed when a sequence's last tokens occurred before is read ahead, in case it comes again.

    lookup   where they occurred, and how often such a match was right so far, drafted or not
    plan     as many drafted rows in a pass as pay: tokens expected over seconds measured

A drafted token is read in one call with the one that is certain, and counts once a draw has given that very token. One
arithmetic gives its row the bits it has alone, and a draw depends on its number alone: so drafts change no token, be it
the likeliest or drawn by chance. What was read in vain leaves no trace (`model/state.py`).
Source of the idea: speculative decoding (Leviathan et al. 2023, arXiv:2211.17192), with the prompt for a draft model.
"""

from collections import deque
from collections.abc import Sequence

from nemotron_h.grid import AHEAD, round_up

GRAMS = (4, 2)  # tokens that must match, the longest looked for first
KNOWN = 16  # of a match: longer ones are not told apart
FIRST_CHANCE = 0.2  # that what follows a match comes again, before anything is known
WEIGHT = 2.0  # of what is taken to be so, in tokens seen
FORGETTING = 0.98  # what was seen counts so much less with each token
AT_ONCE = 4096  # tokens that are taken in before a pass: milliseconds, which everybody waits

ROWS = 4  # rows of a pass with drafts come in multiples of it, so that calls are of few sizes
MOST_ROWS = 16  # of such a pass
GUESS = 1 / 16  # of a pass: what a row more is taken to cost until it is measured
RECENT = 5  # measurements of a size, of which the least is taken
STALE = 256  # passes after which they are forgotten, for they may have been of a busy moment
ONCE = 32  # passes after which a single one is


class Lookup:
    """What may follow in one sequence, as it grows."""

    def __init__(self) -> None:
        self._place: int | None = None  # of what followed, the last time
        self._matched = 0  # tokens before it that are those before the next
        self._after: dict[tuple[int, ...], int] = {}  # the place after each run of tokens, the latest
        self._read = 0  # tokens that are in it
        self._whole = False  # are they all?
        self._right, self._seen = ([0.0] * (KNOWN.bit_length() + 1) for _ in range(2))  # by `_kind` of match

    def follow(self, tokens: Sequence[int]) -> None:
        """Take in what is new of tokens: those of the last time, and more; of very many some, and the rest later."""
        last = min(len(tokens), self._read + AT_ONCE)
        for end in range(self._read + 1, last + 1):
            if self._place is not None:
                right = tokens[self._place] == tokens[end - 1]
                self._learn(right)
                self._place, self._matched = (self._place + 1, self._matched + 1) if right else (None, 0)
            grams = [tuple(tokens[end - length : end]) for length in GRAMS if end >= length]
            if self._place is None and (self._whole or end == len(tokens)):  # of a prompt only what may follow its end
                self._place = next((self._after[gram] for gram in grams if gram in self._after), None)
                self._matched = self._common(tokens, end)
            for gram in grams:
                self._after[gram] = end
        self._read, self._whole = last, last == len(tokens)

    def _common(self, tokens: Sequence[int], end: int) -> int:
        """How many tokens before the place found are those before end, up to KNOWN."""
        if self._place is None:
            return 0
        for length in range(min(self._place, KNOWN)):
            if tokens[self._place - 1 - length] != tokens[end - 1 - length]:
                return length
        return min(self._place, KNOWN)

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """So many tokens that may come next; a match that runs into the end goes round."""
        if self._place is None:
            return []
        period = len(tokens) - self._place
        return [tokens[self._place + k % period] for k in range(count)]

    def chances(self, count: int) -> list[float]:
        """Of the first tokens of a draft: that all up to each come; none where nothing matches."""
        found, chance = [], 1.0
        for k in range(count if self._place is not None else 0):
            chance *= self._chance(self._matched + k)
            found.append(chance)
        return found

    def _chance(self, matched: int) -> float:
        """That the token after a match of that length comes again: as seen, and where little was, of shorter ones."""
        chance = FIRST_CHANCE
        for kind in range(1, _kind(matched) + 1):
            chance = (self._right[kind] + WEIGHT * chance) / (self._seen[kind] + WEIGHT)
        return chance

    def _learn(self, right: bool) -> None:
        kind = _kind(self._matched)
        self._right[kind] = FORGETTING * self._right[kind] + right
        self._seen[kind] = FORGETTING * self._seen[kind] + 1


def _kind(matched: int) -> int:
    """Matches of 1, 2-3, 4-7, 8-15, and more tokens."""
    return min(matched, KNOWN).bit_length()


class Drafts:
    """Which sequences read ahead in a pass, and how far."""

    def __init__(self, mode: str, multiple: int) -> None:
        """mode: as `EngineConfig.drafts`. multiple: of a call's rows, where nobody reads ahead."""
        self.mode, self.multiple, self.size = mode, multiple, max(multiple, ROWS)
        self._seconds: dict[tuple[int, int], deque[float]] = {}  # of passes, by sequences and rows
        self._measured: dict[tuple[int, int], int] = {}  # the pass of the last measurement
        self._passes = 0

    def plan(self, lookups: Sequence[Lookup], tokens: Sequence[Sequence[int]], rooms: Sequence[int]) -> list[list[int]]:
        """The draft of each sequence, of at most as many tokens as there is room for."""
        if self.mode == "off":
            return [[] for _ in lookups]
        for lookup, own in zip(lookups, tokens, strict=True):
            lookup.follow(own)
        limits = [min(room, AHEAD) for room in rooms]
        if self.mode == "always":
            return [lookup.draft(own, limit) for lookup, own, limit in zip(lookups, tokens, limits, strict=True)]
        offered = [lookup.chances(limit) for lookup, limit in zip(lookups, limits, strict=True)]
        # a token is never likelier than the one before it: the likeliest of all are the beginnings of drafts
        likeliest = sorted(((chance, row) for row, own in enumerate(offered) for chance in own), reverse=True)
        chosen = likeliest[: self._worth([chance for chance, _ in likeliest], len(lookups))]
        lengths = [0] * len(lookups)
        for _, row in chosen:
            lengths[row] += 1
        return [lookup.draft(own, length) for lookup, own, length in zip(lookups, tokens, lengths, strict=True)]

    def _worth(self, chances: Sequence[float], sequences: int) -> int:
        """How many drafted tokens give the most tokens a second."""
        alone = round_up(sequences, self.multiple)
        base = self._known(sequences, alone)
        if not chances or base is None:
            return 0
        best, most, seconds = 0, 0.0, base
        for rows in (alone, *range(round_up(alone + 1, self.size), MOST_ROWS + 1, self.size)):
            # without a measurement no less than fewer rows take
            seconds = self._known(sequences, rows) or max(seconds, base * (1 + GUESS * (rows - alone)))
            rate = (sequences + sum(chances[: rows - sequences])) / seconds
            if rate > most:
                best, most = rows - sequences, rate
        return best

    def _known(self, sequences: int, rows: int) -> float | None:
        key = sequences, rows
        if key not in self._seconds:
            return None
        limit = STALE if len(self._seconds[key]) > 1 else ONCE
        return min(self._seconds[key]) if self._passes - self._measured[key] < limit else None

    def measured(self, sequences: int, drafted: int, seconds: float) -> None:
        """A pass of everybody's next token, and of so many drafted ones, took so long."""
        key = sequences, round_up(sequences + drafted, self.size if drafted else self.multiple)
        if self._passes - self._measured.get(key, -STALE) >= STALE:
            self._seconds[key] = deque(maxlen=RECENT)
        self._seconds[key].append(seconds)
        self._passes += 1
        self._measured[key] = self._passes
