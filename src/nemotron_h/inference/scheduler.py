"""Who is computed in a pass, and how much of each: everybody's next token, and one portion of prompts between them.

A sequence is read up to its last token and then given the next; so a prompt, a drawn token and what must be read again
after an interruption are all the same: tokens not yet read. Whoever has one unread is one row of the pass. Those with
more share the portion: half of it is the eldest's, the rest goes in order of arrival, so that a long prompt neither
stops the others nor is stopped by them.
"""

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from nemotron_h.inference.prefix import Keys, Kind, Snapshot
from nemotron_h.inference.request import Answer
from nemotron_h.inference.sampling import Sampler
from nemotron_h.text.stream import StopStrings, TextStream


@dataclass(slots=True, eq=False)
class Sequence:
    """An answer in progress. Its row and its position are the state's."""

    answer: Answer
    number: int  # in the order of arrival
    sampler: Sampler
    tokens: list[int]  # the prompt, and what was drawn
    prompt: Keys
    salt: str | None  # of the tree that it reuses and feeds; None: neither
    text: TextStream | None  # None: the engine has no tokenizer
    stop: StopStrings
    pauses: dict[int, Kind] = field(default_factory=dict)  # places where reading stops, for a snapshot
    awaited: set[int] = field(default_factory=set)  # places where another request will begin
    logits: Tensor | None = None  # (vocab,), after the last token that was read, where they were wanted
    audited: Snapshot | None = None  # read cold, to be compared with this

    @property
    def keys(self) -> Keys:
        """Of its tokens."""
        return self.prompt if len(self.tokens) == len(self.prompt) else np.array(self.tokens, dtype=np.int64)

    def left(self, position: int) -> int:
        """Tokens to read before the next is drawn, or before a pause."""
        return min([len(self.tokens), *(place for place in self.pauses if place > position)]) - position

    @property
    def longest(self) -> int:
        """Tokens that it will have read at most: the last one drawn is not read."""
        return len(self.prompt) + self.answer.request.max_tokens - 1


def shares(running: Sequence_[Sequence], positions: Sequence_[int], portion: int) -> tuple[list[int], int]:
    """Tokens of each in the next pass, in the order of rows; and how many more of prompts would find room in it.

    positions: tokens that each has read.
    """
    left = [sequence.left(position) for sequence, position in zip(running, positions, strict=True)]
    readers, counts = [], []
    for row, (sequence, position) in enumerate(zip(running, positions, strict=True)):
        reads = len(sequence.tokens) - position > 1
        counts.append(0 if reads else 1)
        if reads:
            readers.append(row)
    if not readers:
        return counts, portion
    readers.sort(key=lambda row: running[row].number)
    eldest = readers.pop(0)
    counts[eldest] = min(left[eldest], max(1, portion // 2))
    room = portion - counts[eldest]
    for row in readers:
        counts[row] = min(left[row], room)
        room -= counts[row]
    counts[eldest] += min(left[eldest] - counts[eldest], room)
    return counts, room


def grid_shares(running: Sequence_[Sequence], positions: Sequence_[int], portion: int) -> tuple[list[int], int]:
    """The same where bits depend on how a prompt is cut: one prompt at a time, in whole portions of its own grid."""
    counts, room = shares(running, positions, portion)
    readers = [row for row, sequence in enumerate(running) if len(sequence.tokens) - positions[row] > 1]
    if not readers:
        return counts, room
    eldest = min(readers, key=lambda row: running[row].number)
    for row in readers:
        counts[row] = 0
    position = positions[eldest]
    counts[eldest] = min(len(running[eldest].tokens) - position, portion - position % portion)
    return counts, 0


def calls(counts: Sequence_[int], *, alone: bool = False) -> list[range]:
    """The rows of each call of the model: neighbours that have tokens. alone: who reads a prompt is by itself."""
    found: list[range] = []
    for row, count in enumerate(counts):
        if not count:
            continue
        joins = found and found[-1].stop == row and not (alone and (count > 1 or counts[row - 1] > 1))
        if joins:
            found[-1] = range(found[-1].start, row + 1)
        else:
            found.append(range(row, row + 1))
    return found
