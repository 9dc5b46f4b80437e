"""The tree of what was read: what matches, where it is cut and why, what stays."""

from random import Random

import numpy as np
import pytest

from nemotron_h.inference.prefix import Cut, Keys, Kind, Node, Prefixes, Snapshot, common
from tests.inference import trace


def keys_of(*tokens: int) -> Keys:
    return np.array(tokens, dtype=np.int64)


def kept(prefixes: Prefixes, keys: Keys, salt: str = "", kind: Kind = Kind.END) -> Snapshot:
    snapshot, _ = prefixes.offer(prefixes.insert(keys, salt), kind)
    assert snapshot is not None
    return snapshot


def test_a_match_ends_where_the_keys_part_and_reuse_at_the_snapshot_above() -> None:
    prefixes = Prefixes(range(4))
    snapshot = kept(prefixes, keys_of(1, 2, 3))
    prefixes.insert(keys_of(1, 2, 3, 4, 5))
    found = prefixes.match(keys_of(1, 2, 3, 4, 9, 5))
    assert (found.matched, found.snapshot, found.reused, found.parted) == (4, snapshot, 3, True)


@pytest.mark.parametrize(
    ("prompt", "matched", "cut"),
    [
        ((1, 2, 3), 3, Cut.WHOLE),
        ((1, 2, 3, 9), 3, Cut.NEW),
        ((9,), 0, Cut.NEW),
        ((1, 2), 2, Cut.NOT_TAKEN),
        ((1, 2, 3, 4, 5), 5, Cut.EVICTED),
        ((1, 2, 3, 4, 5, 6, 7), 6, Cut.EVICTED),
    ],
)
def test_the_reason_of_the_cut(prompt: tuple[int, ...], matched: int, cut: Cut) -> None:
    prefixes = Prefixes(range(4))
    kept(prefixes, keys_of(1, 2, 3))
    prefixes.drop(kept(prefixes, keys_of(1, 2, 3, 4, 5)))
    prefixes.insert(keys_of(1, 2, 3, 4, 5, 6))
    found = prefixes.match(keys_of(*prompt))
    assert (found.matched, found.cut) == (matched, cut)


def test_a_snapshot_taken_again_is_no_longer_missed() -> None:
    prefixes = Prefixes(range(4))
    prefixes.drop(kept(prefixes, keys_of(1, 2, 3)))
    kept(prefixes, keys_of(1, 2, 3))
    assert prefixes.match(keys_of(1, 2, 3, 4)).cut is Cut.NEW


def test_salts_know_nothing_of_each_other() -> None:
    prefixes = Prefixes(range(4))
    kept(prefixes, keys_of(1, 2, 3), salt="one")
    assert prefixes.match(keys_of(1, 2, 3), salt="other").matched == 0
    assert prefixes.match(keys_of(1, 2, 3), salt="one").reused == 3


def test_the_place_where_two_prompts_part_is_a_candidate_once_it_has_been_seen() -> None:
    prefixes = Prefixes(range(8))
    first, second, third = (np.concatenate([np.arange(100), np.full(20, last)]) for last in (200, 201, 202))
    match = prefixes.match(first)
    assert prefixes.stops(len(first), match, (), 512) == {120: Kind.END}
    prefixes.insert(first)
    match = prefixes.match(second)
    assert prefixes.stops(len(second), match, (), 512) == {100: Kind.SHARED, 120: Kind.END}
    kept(prefixes, second[:100], kind=Kind.SHARED)
    prefixes.insert(second)
    match = prefixes.match(third)
    assert match.reused == 100
    assert prefixes.stops(len(third), match, (), 512) == {120: Kind.END}


def test_a_prompt_that_goes_on_where_another_ended_has_not_parted() -> None:
    prefixes = Prefixes(range(8))
    prefixes.insert(np.arange(50))
    match = prefixes.match(np.arange(60))
    assert (match.matched, match.parted) == (50, False)


def test_candidates_lie_beyond_what_is_reused_in_order_and_thin_out_backwards() -> None:
    prefixes = Prefixes(range(8))
    match = prefixes.match(np.arange(9000))
    found = prefixes.stops(9000, match, [0, 30, 8999], 512)
    tail = [place for place, kind in found.items() if kind is Kind.TAIL]
    assert tail == [512, 4608, 6656, 7680, 8192]
    assert list(found) == sorted(found) == [30, *tail, 8999, 9000]
    kept(prefixes, np.arange(7000))
    assert list(prefixes.stops(9000, prefixes.match(np.arange(9000)), [30], 512)) == [7680, 8192, 9000]


def test_the_one_that_saves_least_goes() -> None:
    prefixes = Prefixes(range(2))
    long, short = kept(prefixes, np.arange(1000)), kept(prefixes, np.arange(10, 60))
    snapshot, gone = prefixes.offer(prefixes.insert(np.arange(2000, 2500)), Kind.END)
    assert gone is short
    assert snapshot is not None
    assert snapshot.slot == short.slot
    assert prefixes.match(np.arange(1000)).snapshot is long
    assert prefixes.match(np.arange(10, 60)).cut is Cut.EVICTED


def test_what_saves_less_than_all_that_is_kept_is_not_taken_unless_somebody_waits_for_it() -> None:
    prefixes = Prefixes(range(1))
    first = kept(prefixes, np.arange(1000))
    node = prefixes.insert(np.arange(5000, 5003))
    assert prefixes.offer(node, Kind.END) == (None, None)
    snapshot, gone = prefixes.offer(node, Kind.END, awaited=True)
    assert snapshot is not None
    assert gone is first


def test_what_is_held_stays() -> None:
    prefixes = Prefixes(range(1))
    first = kept(prefixes, np.arange(10))
    first.pins = 1
    assert prefixes.offer(prefixes.insert(np.arange(100, 900)), Kind.END, awaited=True) == (None, None)


def test_a_place_keeps_one_snapshot() -> None:
    prefixes = Prefixes(range(2))
    kept(prefixes, np.arange(10))
    assert prefixes.offer(prefixes.insert(np.arange(10)), Kind.REPLY) == (None, None)
    assert len(prefixes.free) == 1


def test_too_many_keys_are_forgotten_oldest_first_and_never_under_a_snapshot() -> None:
    prefixes = Prefixes(range(2), remembered_tokens=1000)
    kept(prefixes, np.arange(100))
    for start in range(1000, 9000, 100):
        prefixes.use(prefixes.match(np.arange(start, start + 100)))
        prefixes.insert(np.arange(start, start + 100))
        assert prefixes.tokens <= 1000
    assert prefixes.match(np.arange(100)).reused == 100
    assert prefixes.match(np.arange(8900, 9000)).matched == 100
    assert prefixes.match(np.arange(1000, 1100)).matched == 0
    assert sum(len(node.keys) for node in nodes(prefixes)) == prefixes.tokens


def test_of_salts_whose_keys_are_forgotten_nothing_stays() -> None:
    prefixes = Prefixes(range(2), remembered_tokens=1000)
    for number in range(100):
        assert prefixes.match(np.arange(100), f"asked {number}").matched == 0
        prefixes.use(prefixes.match(np.arange(100), f"user {number}"))
        prefixes.insert(np.arange(100), f"user {number}")
    assert prefixes.match(np.arange(100), "user 99").matched == 100
    assert prefixes.match(np.arange(100), "user 0").matched == 0
    assert len(prefixes._roots) == prefixes.tokens // 100 <= 10


def nodes(prefixes: Prefixes, salt: str = "") -> list[Node]:
    found, left = [], [prefixes.insert(keys_of(), salt)]
    while left:
        found.append(left.pop())
        left.extend(found[-1].children.values())
    return found


def test_against_a_list_of_all_that_was_inserted() -> None:
    """Matches and slots as a program without a tree finds them, over a random life."""
    rng = Random(0)
    prefixes, known = Prefixes(range(6)), list[tuple[int, ...]]()
    for _ in range(1500):
        prompt = tuple(rng.randrange(3) for _ in range(rng.randrange(1, 12)))
        found = prefixes.match(keys_of(*prompt))
        assert found.matched == max((common(keys_of(*prompt), keys_of(*other)) for other in known), default=0)
        places = [path(snapshot.node) for snapshot in prefixes.snapshots.values()]
        assert found.reused == max((len(place) for place in places if prompt[: len(place)] == place), default=0)
        prefixes.use(found)
        if rng.random() < 0.5:
            prefixes.offer(prefixes.insert(keys_of(*prompt)), rng.choice(list(Kind)), awaited=rng.random() < 0.3)
            known.append(prompt)
        elif rng.random() < 0.2 and prefixes.snapshots:
            prefixes.drop(rng.choice(list(prefixes.snapshots.values())))
        assert sorted([*prefixes.free, *prefixes.snapshots]) == list(range(6))
        assert len(set(places)) == len(places)


def path(node: Node) -> tuple[int, ...]:
    """All keys down to a node."""
    keys = []
    above: Node | None = node
    while above is not None:
        keys.append(above.keys)
        above = above.parent
    return tuple(int(key) for key in np.concatenate(keys[::-1]))


def test_placement_on_conversations_against_lru_and_an_oracle() -> None:
    """A tenth of the room that all candidates would take; `trace.py` says what the conversations are."""
    calls = trace.conversations()
    _, everything = trace.ours(calls, 100_000)
    slots = len(everything.snapshots) // 10
    ours, _ = trace.ours(calls, slots)
    lru, oracle = trace.least_recently_used(calls, slots), trace.oracle(calls, slots)
    assert ours >= (1.3 * lru if 1.3 * lru <= oracle else 0.9 * oracle)
    assert ours >= 0.8 * oracle
