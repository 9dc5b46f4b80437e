"""Who is computed in a pass, and how much of each; where each begins, and where it leaves a snapshot.

A sequence is read up to its last token and then given the next; so a prompt, a drawn token and what must be read again
after an interruption are all the same: tokens not yet read. Whoever has one unread is one row of the pass. Those with
more share the portion: half of it is the eldest's, the rest goes in order of arrival, so that a long prompt neither
stops the others nor is stopped by them.
"""

import logging
import random
from collections import Counter, deque
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field, replace

import torch

from nemotron_h.config.engine import EngineConfig
from nemotron_h.errors import CapacityError, DataError
from nemotron_h.grid import CHUNK
from nemotron_h.inference.memory import Memory
from nemotron_h.inference.prefix import Cut, Kind, Match, Snapshot, common
from nemotron_h.inference.request import Reuse
from nemotron_h.inference.sequence import Sequence
from nemotron_h.inference.store import Store

LOG = logging.getLogger(__name__)
WORTH_WAITING = CHUNK  # tokens that somebody else is about to read, or a file holds: fewer are read at once


@dataclass(slots=True)
class Counts:
    """What an engine has done so far."""

    requests: int = 0
    passes: int = 0
    read_tokens: int = 0  # of prompts, drawn ones, and those read again
    matched_tokens: int = 0
    reused_tokens: int = 0
    lost_tokens: Counter[Cut] = field(default_factory=Counter)  # of prompts, by why they were not reused
    drafted_tokens: int = 0  # read ahead of being known
    accepted_tokens: int = 0  # of those, the ones that came
    audits: int = 0
    audited_tokens: int = 0  # of those reused, read all the same, to be compared

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts: those reused, and those that were not."""
        return self.reused_tokens + self.lost_tokens.total()


class Scheduler:
    """Those who wait, and those who run."""

    def __init__(self, memory: Memory, config: EngineConfig, *, exact: bool) -> None:
        """exact: bits do not depend on how a prompt is cut; else only whole portions of its own grid are reused."""
        self.memory, self.config, self.exact = memory, config, exact
        self.running: list[Sequence] = []  # in the order of rows
        self.queue: deque[Sequence] = deque()
        self.store: Store | None = None  # snapshots in a folder
        self.counts = Counts()
        self.trusting = True  # no audit has failed yet
        self._audits = random.Random(0)

    @property
    def positions(self) -> list[int]:
        """Tokens that each of those who run has read."""
        return self.memory.state.positions[: len(self.running)]

    def admit(self) -> Sequence | None:
        """The first of those who wait that may begin now, which has begun: while there are rows, pages, and room in the
        pass. Raises: CapacityError where nobody runs, and still nobody can begin."""
        if len(self.running) == self.config.max_running:
            return None
        _, room = self.shares()
        for sequence in self.queue:
            match = self._match(sequence)
            if not room and match.reused < len(sequence.tokens):
                return None
            if self._about_to_be_read(sequence, match):
                continue
            match = self._fetched(sequence, match)
            if self._begun(sequence, match):
                self.queue.remove(sequence)
                return sequence
            if self.running:
                return None
            raise CapacityError("pages: too few are free, and nobody runs; close a session that holds them")
        return None

    def _begun(self, sequence: Sequence, match: Match) -> bool:
        """Let a sequence begin: cold, beside the snapshot, where that is to be audited; else after it; where nobody
        runs and pages are wanting all the same, without it, for it may hold them."""
        row, audited = len(self.running), match.snapshot
        if audited is not None and self._audits.random() < self.config.audit_fraction:
            cold = replace(match, snapshot=None)
            if self.memory.begin(row, cold, sequence.longest, beside=audited):
                self._run(sequence, match, cold, audited)
                self.counts.audited_tokens += match.reused
                return True
        if self.memory.begin(row, match, sequence.longest):
            self._run(sequence, match, match, None)
            return True
        cold = replace(match, snapshot=None, cut=Cut.EVICTED)
        if row or audited is None or not self.memory.begin(row, cold, sequence.longest):
            return False
        self._run(sequence, cold, cold, None)
        return True

    def _run(self, sequence: Sequence, match: Match, begun: Match, audited: Snapshot | None) -> None:
        self.running.append(sequence)
        self._count(sequence, match)
        if match.cut is not Cut.OFF:
            self._plan(sequence, begun, audited)
            self.memory.prefixes.use(match)

    def shares(self) -> tuple[list[int], int]:
        """Tokens of each in the next pass, in the order of rows; and how many more of prompts would find room in it."""
        return (shares if self.exact else grid_shares)(self.running, self.positions, self.config.portion_tokens)

    def read(self, counts: Sequence_[int]) -> None:
        """So many tokens of each have been read: who is at a place worth it leaves a snapshot."""
        self.counts.passes += 1
        self.counts.read_tokens += sum(counts)
        for row, (sequence, place) in enumerate(zip(self.running, self.positions, strict=True)):
            if place in sequence.pauses:
                self.keep(row, sequence, sequence.pauses.pop(place))
        if self.memory.distrusted is not None and self.trusting:
            self.trusting = False  # what was computed from such a snapshot is read again, and its like are gone
            if self.store is not None:
                self.store.clear()
            self.retract()

    def keep(self, row: int, sequence: Sequence, kind: Kind, *, awaited: bool = False) -> None:
        """Offer a sequence's state, as it is now, for a snapshot."""
        memory, place, logits = self.memory, self.memory.state.positions[row], sequence.logits
        if not place or (logits is not None and not torch.isfinite(logits).all()):
            return
        if sequence.audited is not None and logits is not None and place == sequence.audited.node.end:
            if sequence.audited.kept:
                self.counts.audits += 1
                memory.audit(row, sequence.audited, logits)
            sequence.let_go()
        if sequence.salt is not None and self.config.reuse and memory.distrusted is None:
            awaited = awaited or place in sequence.awaited
            memory.keep(row, sequence.keys[:place], sequence.salt, kind, logits, awaited=awaited)

    def accept(self, sequence: Sequence) -> None:
        """The first token of its draft has come: it has been read already."""
        (_, sequence.logits), *sequence.ahead = sequence.ahead
        self.memory.state.go_on(self.running.index(sequence))
        sequence.answer.accepted += 1
        self.counts.accepted_tokens += 1
        self.counts.read_tokens += 1

    def leave(self, sequence: Sequence, *, damaged: bool) -> None:
        """A sequence leaves, from wherever it is. damaged: its state must not be used again."""
        if sequence in self.queue:
            self.queue.remove(sequence)
            return
        row, last = self.running.index(sequence), len(self.running) - 1
        if self.exact and not damaged:
            self.keep(row, sequence, Kind.REPLY)
        sequence.let_go()
        self.memory.end(row, last, damaged=damaged)
        self.running[row] = self.running[last]
        self.running.pop()
        salt = sequence.salt
        if salt is not None and sequence.alone and all(o.salt != salt for o in (*self.running, *self.queue)):
            self.memory.forget_salt(salt)

    def retract(self) -> None:
        """Rows are half-written, or of no use any more: everybody begins again, where snapshots allow."""
        for row in reversed(range(len(self.running))):
            self.memory.end(row, row)
            self.running[row].begin_again()
            self.queue.appendleft(self.running[row])
        self.running.clear()

    def reset(self) -> None:
        """Something ended in the middle: everybody begins again, and nothing that was read is trusted."""
        everybody = {sequence.number: sequence for sequence in (*self.running, *self.queue)}
        left = [own for _, own in sorted(everybody.items()) if own.answer.finish is None]
        for sequence in left:
            sequence.audited = None
            sequence.begin_again()
        self.running.clear()
        self.queue.clear()
        self.queue += left
        self.memory.reset()

    def _match(self, sequence: Sequence) -> Match:
        """What can be reused of it."""
        if sequence.salt is None or not self.config.reuse or self.memory.distrusted is not None:
            return Match(0, None, Cut.OFF)
        return self.memory.prefixes.match(sequence.keys, sequence.salt)

    def _about_to_be_read(self, sequence: Sequence, match: Match) -> bool:
        """Is somebody reading more of the same prompt than can be reused yet? Then this one waits, and a snapshot will
        lie where the two part."""
        if match.cut is Cut.OFF or not (self.exact and self.memory.sizes.snapshots):
            return False
        for position, other in zip(self.positions, self.running, strict=True):
            if other.salt != sequence.salt or len(other.tokens) - position < 2:
                continue
            place = common(other.prompt, sequence.prompt)
            if place > position and place - match.reused >= WORTH_WAITING:
                other.pauses.setdefault(place, Kind.SHARED)
                other.awaited.add(place)
                return True
        return False

    def _fetched(self, sequence: Sequence, match: Match) -> Match:
        """The match, with a deeper snapshot of the folder in memory, where there is one."""
        if self.store is None or match.cut is Cut.OFF or sequence.salt is None:
            return match
        place, path = self.store.match(sequence.keys, sequence.salt)
        if path is None or place - match.reused < WORTH_WAITING:
            return match
        if not self.memory.has_room(self.memory.blocks(sequence.longest)):
            return match  # it cannot begin yet: the file is read when it can
        try:
            self.memory.load(sequence.keys[:place], sequence.salt, *self.store.get(path))
        except (DataError, CapacityError) as error:
            LOG.warning("a snapshot is not used: %s", error)
        return self._match(sequence)

    def _count(self, sequence: Sequence, match: Match) -> None:
        """What became of its prompt, once: who was interrupted begins again."""
        if sequence.answer.reuse is not None:
            return
        length = len(sequence.tokens)
        sequence.answer.reuse = Reuse(length, match.matched, match.reused, match.cut)
        self.counts.matched_tokens += match.matched
        self.counts.reused_tokens += match.reused
        self.counts.lost_tokens[match.cut] += length - match.reused

    def _plan(self, sequence: Sequence, match: Match, audited: Snapshot | None) -> None:
        """Where its reading will pause."""
        length, portion = len(sequence.tokens), self.config.portion_tokens
        if self.exact:
            boundaries = sequence.answer.request.boundaries
            sequence.pauses = self.memory.prefixes.stops(length, match, boundaries, portion)
        else:
            sequence.pauses = dict.fromkeys(range(match.reused + portion, length + 1, portion), Kind.TAIL)
        if match.snapshot is not None:
            sequence.logits = self.memory.logits.get(match.snapshot.slot)
        if audited is not None:
            audited.pins += 1
            sequence.audited = audited
            sequence.pauses[audited.node.end] = audited.kind


def shares(running: Sequence_[Sequence], positions: Sequence_[int], portion: int) -> tuple[list[int], int]:
    """Tokens of each in the next pass, in the order of rows; and how many more of prompts would find room in it.

    positions: tokens that each has read.
    """
    left = [sequence.left(position) for sequence, position in zip(running, positions, strict=True)]
    readers = reading(running, positions)
    counts = [0 if row in readers else count for row, count in enumerate(left)]
    if not readers:
        return counts, portion
    eldest, *others = readers
    counts[eldest] = min(left[eldest], max(1, portion // 2))
    room = portion - counts[eldest]
    for row in others:
        counts[row] = min(left[row], room)
        room -= counts[row]
    counts[eldest] += min(left[eldest] - counts[eldest], room)
    return counts, room


def grid_shares(running: Sequence_[Sequence], positions: Sequence_[int], portion: int) -> tuple[list[int], int]:
    """The same where bits depend on how a prompt is cut: one prompt at a time, in whole portions of its own grid."""
    counts, room = shares(running, positions, portion)
    readers = reading(running, positions)
    if not readers:
        return counts, room
    eldest, *others = readers
    for row in others:
        counts[row] = 0
    position = positions[eldest]
    counts[eldest] = min(len(running[eldest].tokens) - position, portion - position % portion)
    return counts, 0


def reading(running: Sequence_[Sequence], positions: Sequence_[int]) -> list[int]:
    """The rows of those with more than their next token to read, the eldest first."""
    pairs = enumerate(zip(running, positions, strict=True))
    rows = [row for row, (sequence, position) in pairs if len(sequence.tokens) - position > 1]
    return sorted(rows, key=lambda row: running[row].number)


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
