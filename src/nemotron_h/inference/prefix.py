"""What has been read before: a tree of token sequences, and which of its places keep a snapshot of the state.

    match   the longest known prefix of a prompt, and the deepest snapshot on it: reading begins there
    stops   where the reading of a prompt pauses, to offer a snapshot
    offer   is a place worth a snapshot, and which one goes for it?

A hybrid cannot go back: its recurrent state is of one place, so a prefix is reused up to a snapshot and not a token
further. Snapshots are large and few, and where they lie decides all. Candidates are places where prompts part: the end
of a prompt and of a reply, where one that is cancelled stands, places that the caller names (where the next turn will
begin), the place where a second prompt has left a known path, and places at doubling distances back from the end of a
long prompt. A snapshot is worth the tokens that it saves beyond the one above it, times how often such a one is used;
the least worth goes.

A key stands for the token at a position: its id, or what an image hashes to. Each salt has a tree of its own. There are
no tensors here: a snapshot is the number of a slot. Places whose snapshots are gone stay, to say why a match was cut.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]


class Cut(StrEnum):
    """Why no more of a prompt was reused than was: the closed list."""

    WHOLE = "whole"  # all of it was
    NEW = "new"  # what follows was never read before
    NOT_TAKEN = "not taken"  # it was read before; no snapshot was taken further on
    EVICTED = "evicted"  # a snapshot lay further on, and has gone for a better one
    OFF = "off"  # the request, or the engine, asked for no reuse


class Kind(StrEnum):
    """Why a place is a candidate."""

    END = "end"  # of a prompt
    REPLY = "reply"  # the end of one, or where a request was cancelled
    GIVEN = "given"  # named by the caller
    SHARED = "shared"  # two prompts have parted here
    TAIL = "tail"  # some way back from the end of a long prompt


@dataclass(slots=True, eq=False)
class Node:
    """A place, `end` tokens from the root, and the keys since its parent."""

    parent: "Node | None"
    keys: Keys
    end: int
    salt: str
    children: "dict[int, Node]" = field(default_factory=dict)  # by the first key
    snapshot: "Snapshot | None" = None
    evicted: bool = False  # a snapshot lay here
    used: int = 0  # when a prompt last came by

    @property
    def path(self) -> Keys:
        """All keys from the root."""
        parts, node = [], self
        while node.parent is not None:
            parts.append(node.keys)
            node = node.parent
        return np.concatenate([np.empty(0, np.int64), *reversed(parts)])


@dataclass(slots=True, eq=False)
class Snapshot:
    """A copy of the state at a place."""

    node: Node
    slot: int
    kind: Kind
    used: int  # when it was taken or last reused
    answers: bool = True  # the logits after it are known as well: an answer can begin here; else more must follow
    hits: int = 0
    pins: int = 0  # of sessions, and of audits under way: it stays

    @property
    def kept(self) -> bool:
        """Is it still there?"""
        return self.node.snapshot is self


@dataclass(frozen=True, slots=True)
class Match:
    """matched: tokens of a prompt that are known; snapshot: the deepest on the way, None where there is none."""

    matched: int
    snapshot: Snapshot | None
    cut: Cut
    parted: bool = False  # the known path goes on, elsewhere

    @property
    def reused(self) -> int:
        return self.snapshot.node.end if self.snapshot is not None else 0


class Prefixes:
    """The trees, and at most so many snapshots.

    remembered_tokens: keys that the trees keep; beyond, paths without snapshots are forgotten, longest unused first.
    """

    def __init__(self, slots: Iterable[int], *, remembered_tokens: int = 2**22) -> None:
        self.free = list(slots)[::-1]
        self.snapshots: dict[int, Snapshot] = {}  # by slot
        self.remembered_tokens = remembered_tokens
        self.tokens = 0  # keys in the trees
        self.now = 0  # requests so far
        self.taken = dict.fromkeys(Kind, 0)  # snapshots, by kind
        self.reused = dict.fromkeys(Kind, 0)  # and how many of them were reused at least once
        self._roots: dict[str, Node] = {}

    def match(self, keys: Keys, salt: str = "") -> Match:
        """What is known of a prompt."""
        found, evicted, matched, parted = None, False, 0, False
        for node, matched in self._walk(keys, salt):
            parted = matched < len(keys) and (matched < node.end or bool(node.children))
            if matched == node.end:
                if node.snapshot is not None and (node.snapshot.answers or matched < len(keys)):
                    found, evicted = node.snapshot, False
                evicted = evicted or node.evicted
        reused = found.node.end if found is not None else 0
        if reused == len(keys):
            cut = Cut.WHOLE
        elif reused == matched:
            cut = Cut.NEW
        else:
            cut = Cut.EVICTED if evicted else Cut.NOT_TAKEN
        return Match(matched, found, cut, parted)

    def use(self, match: Match) -> None:
        """A request begins with what was matched."""
        self.now += 1
        if match.snapshot is not None:
            snapshot = match.snapshot
            self.reused[snapshot.kind] += snapshot.hits == 0
            snapshot.hits += 1
            snapshot.used = self.now

    def stops(self, length: int, match: Match, given: Iterable[int], portion: int) -> dict[int, Kind]:
        """Where the reading of a prompt of that length, from what is reused, should pause; in order."""
        tail, back = {}, portion
        while back < length:
            place = (length - back) // portion * portion
            tail[place] = Kind.TAIL
            back *= 2
        found = tail | dict.fromkeys(given, Kind.GIVEN)
        if match.parted:
            found[match.matched] = Kind.SHARED
        found[length] = Kind.END
        return {place: found[place] for place in sorted(found) if match.reused < place <= length}

    def along(self, keys: Keys, salt: str = "") -> list[Snapshot]:
        """All snapshots on the way, the deepest last."""
        path = self._walk(keys, salt)
        return [node.snapshot for node, matched in path if matched == node.end and node.snapshot is not None]

    def insert(self, keys: Keys, salt: str = "") -> Node:
        """The place at the end of keys, known from now on."""
        path = list(self._walk(keys, salt))
        for node, _ in path:
            node.used = self.now
        self._roots.setdefault(salt, path[0][0])
        node, matched = path[-1]
        if matched < node.end:
            node = self._split(node, matched)
        if matched < len(keys):
            node = self._grown(node, keys[matched:])
        self._forget(node)
        return node

    def offer(
        self, node: Node, kind: Kind, *, awaited: bool = False, answers: bool = True
    ) -> tuple[Snapshot | None, Snapshot | None]:
        """A snapshot for this place, None where it has one or is not worth it; and the one that goes for it, whose slot
        it takes. awaited: another request will begin here at once. answers: an answer can begin here."""
        if node.snapshot is not None:
            return None, None
        snapshot, gone = Snapshot(node, -1, kind, self.now, answers, hits=int(awaited)), None
        if not self.free:
            node.snapshot = snapshot  # while it is weighed: what lies below it is worth less with it
            gone = self.worst()
            node.snapshot = None
            if gone is None or (not awaited and self.worth(gone) >= self.worth(snapshot)):
                return None, None
            self.drop(gone)
        snapshot.slot = self.free.pop()
        self.snapshots[snapshot.slot] = snapshot
        node.snapshot, node.evicted = snapshot, False
        self.taken[kind] += 1
        return snapshot, gone

    def worst(self) -> Snapshot | None:
        """The one that may go and is worth least."""
        return min((one for one in self.snapshots.values() if not one.pins), key=self.worth, default=None)

    def worth(self, snapshot: Snapshot) -> float:
        """Tokens that it saves, times how soon it may be used again: the share of its kind that was ever reused, its
        own hits, and how long it has lain unused."""
        above = snapshot.node.parent
        while above is not None and above.snapshot is None:
            above = above.parent
        saved = snapshot.node.end - (above.end if above is not None else 0)
        share = (self.reused[snapshot.kind] + 1) / (self.taken[snapshot.kind] + 2)
        return saved * (share + snapshot.hits) / (self.now - snapshot.used + 1)

    def drop(self, snapshot: Snapshot) -> None:
        """Its slot is free again; the place stays known."""
        snapshot.node.snapshot, snapshot.node.evicted = None, True
        del self.snapshots[snapshot.slot]
        self.free.append(snapshot.slot)

    def forget(self, salt: str) -> None:
        """Nothing of it is known any more; its snapshots have gone before."""
        if (root := self._roots.pop(salt, None)) is not None:
            self.tokens -= sum(len(node.keys) for node in below(root))

    def _walk(self, keys: Keys, salt: str) -> Iterator[tuple[Node, int]]:
        """Nodes along keys, each with how many keys match up to it or into it."""
        node, place = self._roots.get(salt) or Node(None, np.empty(0, np.int64), 0, salt), 0
        yield node, 0
        while place < len(keys) and (child := node.children.get(int(keys[place]))) is not None:
            place += common(child.keys, keys[place:])
            yield child, place
            if place < child.end:
                return
            node = child

    def _split(self, node: Node, place: int) -> Node:
        """A new node inside the keys of another, above it."""
        assert node.parent is not None
        cut = place - node.parent.end
        upper = Node(node.parent, node.keys[:cut], place, node.salt, used=node.used)
        node.parent.children[int(upper.keys[0])] = upper
        node.parent, node.keys = upper, node.keys[cut:]
        upper.children[int(node.keys[0])] = node
        return upper

    def _grown(self, parent: Node, keys: Keys) -> Node:
        node = Node(parent, keys.copy(), parent.end + len(keys), parent.salt, used=self.now)
        parent.children[int(keys[0])] = node
        self.tokens += len(keys)
        return node

    def _forget(self, new: Node) -> None:
        """Where too many keys are known, forget the leaves that were unused for longest, but for a new one."""
        while self.tokens > self.remembered_tokens:
            nodes = (node for root in self._roots.values() for node in below(root))
            leaves = [node for node in nodes if not node.children and node.snapshot is None and node.parent]
            leaves = [leaf for leaf in leaves if leaf is not new]
            if not leaves:
                return
            leaves.sort(key=lambda leaf: leaf.used)
            for leaf in leaves[: len(leaves) // 8 + 1]:
                assert leaf.parent is not None
                del leaf.parent.children[int(leaf.keys[0])]
                self.tokens -= len(leaf.keys)
                if leaf.parent.parent is None and not leaf.parent.children:
                    del self._roots[leaf.salt]


def below(node: Node) -> Iterator[Node]:
    """It, and all below it."""
    left = [node]
    while left:
        node = left.pop()
        left.extend(node.children.values())
        yield node


def common(one: Keys, other: Keys) -> int:
    """How many keys two sequences begin with alike."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
