"""A trace of conversations for judging where snapshots are placed, and players that reuse what they can of it.

300 conversations over five system prompts of 300 tokens, interleaved: turns, edits of the last message, regenerations,
and in half of them thinking that the next turn's prompt does not show again. The seed was fixed before anything was
tuned to it.
"""

import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

import numpy as np

from nemotron_h.inference.prefix import Kind, Match, Prefixes

SEED = 20260101
PORTION = 512
START, USER, ASSISTANT, THINK, THOUGHT, END = range(6)  # tokens that templates write; all others come once


@dataclass(frozen=True)
class Call:
    """One request of the trace."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    given: tuple[int, ...]  # places where the caller knows that prompts may part

    @property
    def read(self) -> tuple[int, ...]:
        """All that is read of it: the last token drawn is not."""
        return (*self.prompt, *self.reply[:-1])

    @cached_property
    def places(self) -> list[int]:
        """What the place after each token of it is called: the same for the same tokens, 0 before the first."""
        names = [0]
        for token in self.read:
            names.append(hash((names[-1], token)))
        return names


@dataclass
class Talk:
    """A conversation as it stands."""

    system: list[int]
    thinks: bool
    turns: int
    history: list[int] = field(default_factory=list)
    last: tuple[list[int], list[int]] | None = None  # the history before the last message, and the message


def conversations(seed: int = SEED, number: int = 300) -> list[Call]:
    rng, fresh = random.Random(seed), count(10)

    def words(length: int) -> list[int]:
        return [next(fresh) for _ in range(length)]

    systems = [words(300) for _ in range(5)]
    talks = [
        Talk(rng.choice(systems), rng.random() < 0.5, 1 + min(int(rng.expovariate(0.25)), 15)) for _ in range(number)
    ]
    calls = []
    while talks:
        talk = rng.choice(talks)
        calls.append(_next(talk, rng, words))
        if talk.turns <= 0 and rng.random() < 0.8:
            talks.remove(talk)
    return calls


def _next(talk: Talk, rng: random.Random, words: Callable[[int], list[int]]) -> Call:
    """A turn, or the last one again, as it was or edited."""
    again = rng.random()
    if talk.last and again < 0.12:
        history, message = talk.last
    elif talk.last and again < 0.24:
        history, old = talk.last
        message = old[: rng.randrange(1, len(old))] + words(rng.randrange(5, 60))
    else:
        history, message = talk.history, [USER, *words(rng.randrange(15, 200))]
        talk.turns -= 1
    head = [START, *talk.system]
    before = [*head, *history]
    prompt, answer = [*before, *message, ASSISTANT], [*words(rng.randrange(40, 400)), END]
    given = [len(head), len(before)]
    talk.last, talk.history = (history, message), [*history, *message, ASSISTANT, *answer]
    if talk.thinks:  # the next prompt parts where the thinking began
        given.append(len(prompt))
        prompt, answer = [*prompt, THINK], [*words(rng.randrange(50, 500)), THOUGHT, *answer]
    return Call(tuple(prompt), tuple(answer), tuple(given))


def ours(calls: list[Call], slots: int) -> tuple[int, Prefixes]:
    """Tokens reused by our placement and eviction with so many snapshots."""
    prefixes, reused = Prefixes(range(slots)), 0
    for call in calls:
        keys = np.array(call.prompt)
        match = prefixes.match(keys)
        prefixes.use(match)
        reused += match.reused
        for place, kind in prefixes.stops(len(keys), match, call.given, PORTION).items():
            prefixes.offer(prefixes.insert(keys[:place]), kind)
        prefixes.offer(prefixes.insert(np.array(call.read)), Kind.REPLY)
    return reused, prefixes


def least_recently_used(calls: list[Call], slots: int) -> int:
    """The same with a snapshot at each request's end, the longest unused out."""
    kept: OrderedDict[int, int] = OrderedDict()  # of each place, by what it is called: its length
    reused = 0
    for call in calls:
        deepest = max(
            (place for place in call.places[: len(call.prompt) + 1] if place in kept), key=kept.get, default=0
        )
        if deepest:
            reused += kept[deepest]
            kept.move_to_end(deepest)
        kept[call.places[-1]] = len(call.read)
        kept.move_to_end(call.places[-1])
        if len(kept) > slots:
            kept.popitem(last=False)
    return reused


def oracle(calls: list[Call], slots: int) -> int:
    """The same with our candidates and knowledge of all that comes: the farthest next use goes, or is not taken."""
    known, plans = Prefixes(()), []
    for call in calls:
        match = known.match(np.array(call.prompt))
        cold = Match(match.matched, None, match.cut, match.parted)
        places = known.stops(len(call.prompt), cold, call.given, PORTION)
        plans.append([*places, len(call.read)])
        known.insert(np.array(call.read))
    uses: dict[int, deque[int]] = {
        call.places[place]: deque() for call, plan in zip(calls, plans, strict=True) for place in plan
    }
    for number, call in enumerate(calls):
        for place in call.places[1 : len(call.prompt) + 1]:
            if place in uses:
                uses[place].append(number)
    kept: dict[int, tuple[int, int]] = {}  # of each place: its next use, and minus its length
    reused = 0
    for call, plan in zip(calls, plans, strict=True):
        passed = [place for place in call.places[1 : len(call.prompt) + 1] if place in uses]
        reused += max((-kept[place][1] for place in passed if place in kept), default=0)
        for place in passed:
            uses[place].popleft()
            if place in kept:
                kept[place] = uses[place][0] if uses[place] else len(calls), kept[place][1]
        for length in plan:
            if uses[call.places[length]]:
                kept[call.places[length]] = uses[call.places[length]][0], -length
                if len(kept) > slots:
                    del kept[max(kept, key=kept.get)]
    return reused
