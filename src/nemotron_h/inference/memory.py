"""All that an engine remembers, in one State: rows of running sequences, snapshots, and the pages that they share.

    slots   0 .. max_running - 1   running sequences, dense: a call takes neighbours as they lie and gathers nothing
            max_running            a hit that is audited is set up here, to be compared
            beyond                 snapshots
    pages   of keys and values, held by every sequence and snapshot that reads them

A snapshot is a slot whose table names the pages of the sequence it was taken from: to take one copies a slot and no
page. A sequence that begins at a snapshot copies its slot, and the last page if that is not full. Every page that a
sequence may come to need is promised to it before it begins, so that none stops in the middle for want of one.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_h import machine
from nemotron_h.config.engine import EngineConfig
from nemotron_h.config.model import AttentionConfig
from nemotron_h.errors import CapacityError
from nemotron_h.grid import BLOCK
from nemotron_h.inference.pages import Pages
from nemotron_h.inference.prefix import Keys, Kind, Match, Prefixes, Snapshot
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.state import State, page_bytes, same_bits, slot_bytes

LOG = logging.getLogger(__name__)
PAGED = (".keys", ".values", ".scales")  # ends of names
FREE_FRACTION = 0.8  # of free memory that an engine takes unasked: the rest is what its passes compute in, and others


@dataclass(frozen=True)
class Sizes:
    """What a memory limit gives room for."""

    pages: int
    snapshots: int
    slot_bytes: int
    page_bytes: int

    @classmethod
    def of(cls, model: Hybrid, engine: EngineConfig, free_bytes: int) -> "Sizes":
        """free_bytes: what the machine has, where the engine's settings name no limit.

        Raises: CapacityError where the running sequences alone do not fit.
        """
        limit = engine.memory_bytes or int(FREE_FRACTION * free_bytes)
        config, dtype = model.config, model.compute_dtype
        slot, page = slot_bytes(config, dtype), page_bytes(config, model.keys_values or dtype)
        rest = limit - (engine.max_running + 1) * slot
        share = engine.pages_fraction if engine.reuse and engine.max_snapshots else 1.0
        pages = int(rest * share) // page if page else 0
        if page and rest >= page and not pages:
            raise CapacityError(
                f"pages_fraction: must leave room for a page of {page:,} bytes; got {share} of {rest:,}; raise it, or "
                "give more memory"
            )
        if rest < 0 or (page and not pages):
            raise CapacityError(
                f"memory_bytes: must hold {engine.max_running} running sequences of {slot:,} bytes, and pages of "
                f"{page:,}; got {limit:,}; give more memory or lower max_running"
            )
        snapshots = int((rest - pages * page) // (slot + 4 * config.vocab_size)) if share < 1 else 0
        return cls(pages, min(snapshots, engine.max_snapshots), slot, page)


class Memory:
    """Rows, pages and snapshots, and how each becomes another."""

    def __init__(self, model: Hybrid, engine: EngineConfig) -> None:
        config, device = model.config, model.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else machine.memory().available_bytes
        self.sizes = Sizes.of(model, engine, free)
        self.scratch = engine.max_running
        first = self.scratch + 1
        slots, dtype, keys_values = first + self.sizes.snapshots, model.compute_dtype, model.keys_values
        self.state = State.pool(config, slots, self.sizes.pages, dtype=dtype, keys_values=keys_values, device=device)
        self.state.use_small_pages(first)
        self.pages = Pages(self.sizes.pages)
        self.slots = range(first, first + self.sizes.snapshots)
        self.prefixes = Prefixes(self.slots)
        self.distrusted: str | None = None  # why nothing is reused any more
        self.logits: dict[int, Tensor] = {}  # (vocab,) float32 after the last token, by slot of snapshots that answer
        self.spill: Callable[[Snapshot], None] = lambda snapshot: None  # told of each that goes to make room
        self.promised = [0] * first  # pages, by row
        self._paged = any(isinstance(layer, AttentionConfig) for layer in config.layers)
        self._poisoned = engine.poisoned

    def blocks(self, tokens: int) -> int:
        """Pages that so many tokens fill."""
        return -(-tokens // BLOCK) if self._paged else 0

    def check_fits(self, tokens: int) -> None:
        """Refuse a sequence that can never be held."""
        if self.blocks(tokens) > self.sizes.pages:
            needed, there = (count * self.sizes.page_bytes for count in (self.blocks(tokens), self.sizes.pages))
            raise CapacityError(
                f"request: needs {needed:,} bytes of keys and values for {tokens:,} tokens; the engine has {there:,}; "
                "ask for less, or give the engine more memory"
            )

    def begin(self, row: int, match: Match, tokens: int, *, beside: Snapshot | None = None) -> bool:
        """A sequence begins in a row, after what is reused; False where pages are wanting for its `tokens`. beside: a
        snapshot that must not go for it."""
        snapshot = match.snapshot
        held = [one for one in (snapshot, beside) if one is not None]
        for one in held:
            one.pins += 1  # it must not go to make room for its own use
        try:
            fits = self._make_room(self.blocks(tokens) - match.reused // BLOCK if self._paged else 0)
        finally:
            for one in held:
                one.pins -= 1
        if not fits:
            return False
        if snapshot is None:
            self.state.restart(row)
        else:
            self.restore(row, snapshot)
        self.promised[row] = self.blocks(tokens)
        return True

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """The row's sequence is at the snapshot's place."""
        state, place = self.state, snapshot.node.end
        state.copy_slot(snapshot.slot, row)
        assert state.positions[row] == place, f"a snapshot of {place} tokens holds {state.positions[row]}"
        if not self._paged:
            return
        table = state.tables[row]
        whole = place // BLOCK
        self.pages.share(table[:whole])
        if place % BLOCK:
            (own,) = self.pages.take(1)
            state.copy_page(table[whole], own)
            table[whole] = own

    def extend(self, row: int, tokens: int) -> None:
        """Pages for so many more tokens of a row, out of those promised to it."""
        table = self.state.tables[row]
        wanted = self.blocks(self.state.positions[row] + tokens) - len(table)
        if wanted > 0 and self._paged:
            table.extend(self.pages.take(wanted))

    def keep(
        self, row: int, keys: Keys, salt: str, kind: Kind, logits: Tensor | None, *, awaited: bool
    ) -> Snapshot | None:
        """Offer a row's state, after all of keys, for a snapshot. logits (vocab,): after the last of them, where they
        are known. awaited: another request will begin there at once."""
        assert self.state.positions[row] == len(keys), (self.state.positions[row], len(keys))
        node = self.prefixes.insert(keys, salt)
        if node.snapshot is not None and logits is not None and not node.snapshot.answers:
            self.logits[node.snapshot.slot] = logits.clone()
            node.snapshot.answers = True
        snapshot, gone = self.prefixes.offer(node, kind, awaited=awaited, answers=logits is not None)
        if gone is not None:
            self.spill(gone)
            self._emptied(gone.slot)
        if snapshot is None:
            return None
        self.pages.share(self.state.tables[row] if self._paged else ())
        self.state.tables[snapshot.slot] = self.state.tables[row]
        if logits is not None:
            self.logits[snapshot.slot] = logits.clone()
        try:
            self.state.copy_slot(row, snapshot.slot)
        except BaseException:
            self.drop(snapshot)  # half a copy is none
            raise
        return snapshot

    def saved(self, snapshots: Sequence[Snapshot]) -> dict[str, Tensor]:
        """Snapshots of one way, the deepest last, as tensors: `snapshots.N.` and `pages.`, the deepest one's."""
        tensors: dict[str, Tensor] = {}
        for number, snapshot in enumerate(snapshots):
            deepest = snapshot is snapshots[-1]
            for name, tensor in self.state.saved(snapshot.slot, paged=deepest).items():
                tensors[f"pages.{name}" if name.endswith(PAGED) else f"snapshots.{number}.{name}"] = tensor
            if snapshot.answers:
                tensors[f"snapshots.{number}.logits"] = self.logits[snapshot.slot]
        return tensors

    def load(
        self, keys: Keys, salt: str, places: Sequence[tuple[int, Kind]], tensors: Mapping[str, Tensor]
    ) -> list[Snapshot]:
        """Snapshots that were `saved`, in the tree again; those that are there stay as they are.

        places: position and kind of each, the deepest last: without it there is nothing, others come where they find
        room. Raises: CapacityError where it does not fit.
        """
        row, held, new = self.scratch, list[Snapshot](), list[Snapshot]()
        deepest = places[-1][0] if places else 0
        if not self._make_room(self.blocks(deepest)):
            raise CapacityError(
                f"session: needs {self.blocks(deepest)} pages of {BLOCK} tokens; {len(self.pages.free)} are free; "
                "close another session, or give the engine more memory"
            )
        table = self.pages.take(self.blocks(deepest))
        try:
            for number, (place, kind) in reversed(list(enumerate(places))):
                own = _beginning(tensors, f"snapshots.{number}.")
                logits = own.pop("logits", None)
                if place == deepest:
                    own |= _beginning(tensors, "pages.")
                self.state.load(row, place, table[: self.blocks(place)], own)
                snapshot = self.keep(row, keys[:place], salt, kind, logits, awaited=True)
                new += [snapshot] if snapshot is not None else []
                snapshot = snapshot or self.prefixes.insert(keys[:place], salt).snapshot
                if snapshot is None and not held:
                    raise CapacityError("session: needs a slot for a snapshot; none is free, or can be made so")
                if snapshot is None:
                    continue
                snapshot.kind = kind
                snapshot.pins += 1  # the next one must not take its slot
                held.append(snapshot)
        except BaseException:
            for snapshot in new:
                self.drop(snapshot)
            raise
        finally:
            for snapshot in held:
                snapshot.pins -= 1
            self.state.tables[row] = table
            self.end(row, row)
        return held[::-1]

    def drop(self, snapshot: Snapshot) -> None:
        self.prefixes.drop(snapshot)
        self._emptied(snapshot.slot)

    def reset(self) -> None:
        """As it was before anything was read, whatever state it is in: something ended in the middle."""
        self.pages = Pages(self.sizes.pages)
        for snapshot in self.prefixes.snapshots.values():
            snapshot.node.snapshot = None
        self.prefixes = Prefixes(self.slots)
        self.logits.clear()
        self.promised = [0] * len(self.promised)
        for slot in range(len(self.state)):
            self.state.tables[slot], self.state.positions[slot] = [], 0
            if self._poisoned:
                self.state.poison_slot(slot)
        if self._poisoned:
            self.state.poison_pages(range(self.sizes.pages))

    def forget(self) -> None:
        """Everything that was read: no snapshot stays, not even one that is held, and nothing is known."""
        for snapshot in list(self.prefixes.snapshots.values()):
            self.drop(snapshot)
        self.prefixes = Prefixes(self.slots)

    def forget_salt(self, salt: str) -> None:
        """Nothing of it is known any more."""
        for snapshot in [one for one in self.prefixes.snapshots.values() if one.node.salt == salt]:
            self.drop(snapshot)
        self.prefixes.forget(salt)

    def end(self, row: int, last: int, *, damaged: bool = False) -> None:
        """The sequence of a row has ended; the one of the last row takes its place. damaged: its state is no numbers
        any more, and all of it is made so."""
        self._give(self.state.tables[row])
        if row != last:
            self.state.copy_slot(last, row)
            self.promised[row] = self.promised[last]
        self.state.tables[last], self.state.positions[last], self.promised[last] = [], 0, 0
        if self._poisoned or damaged:
            self.state.poison_slot(last)

    def audit(self, row: int, snapshot: Snapshot, logits: Tensor) -> None:
        """Compare a row that was read cold, and its logits (vocab,), with what a hit on the snapshot would get: set up
        as for a hit. A cache that was wrong once is not asked again."""
        if self._paged and not self._make_room(1):
            return  # no page to set it up in
        self.restore(self.scratch, snapshot)
        found = self.state.difference(row, self.scratch)
        if found is None and snapshot.answers and not same_bits(self.logits[snapshot.slot], logits):
            found = "logits"
        self.end(self.scratch, self.scratch)
        if found is not None:
            self.distrusted = f"a snapshot of {snapshot.node.end:,} tokens is not what they give read cold: {found}"
            LOG.warning("nothing is reused from now on: %s", self.distrusted)
            self.forget()

    @property
    def _owed(self) -> int:
        """Pages that are promised, and not yet held."""
        return sum(max(0, promised - len(self.state.tables[row])) for row, promised in enumerate(self.promised))

    def has_room(self, count: int) -> bool:
        """Are so many pages free and not promised, or would be if snapshots went?"""
        if len(self.pages.free) - self._owed >= count:
            return True
        pinned = [slot for slot, snapshot in self.prefixes.snapshots.items() if snapshot.pins]
        stay = {page for row in (*range(len(self.promised)), *pinned) for page in self.state.tables[row]}
        return self.sizes.pages - len(stay) - self._owed >= count

    def _make_room(self, count: int) -> bool:
        """Let snapshots go until so many pages are free and not promised; whether they are. Where all of them would not
        be enough, none goes."""
        if not self.has_room(count):
            return False
        owed = self._owed
        while len(self.pages.free) - owed < count:
            for snapshot in min(self._ends(), key=lambda some: sum(map(self.prefixes.worth, some))):
                self.spill(snapshot)
                self.drop(snapshot)
        return True

    def _ends(self) -> list[list[Snapshot]]:
        """Snapshots by the page that they end on, where nobody else holds it: if they all go, it is free."""
        ending: dict[int, list[Snapshot]] = {}
        for snapshot in self.prefixes.snapshots.values():
            ending.setdefault(self.state.tables[snapshot.slot][-1], []).append(snapshot)
        return [
            some
            for page, some in ending.items()
            if self.pages.holders[page] == len(some) and not any(snapshot.pins for snapshot in some)
        ]

    def _emptied(self, slot: int) -> None:
        self.logits.pop(slot, None)
        self._give(self.state.tables[slot])
        self.state.tables[slot], self.state.positions[slot] = [], 0
        if self._poisoned:
            self.state.poison_slot(slot)

    def _give(self, table: Sequence[int]) -> None:
        freed = self.pages.give(table) if self._paged else []
        if self._poisoned and freed:
            self.state.poison_pages(freed)


def _beginning(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of the name."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
