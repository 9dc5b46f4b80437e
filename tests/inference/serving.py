"""What an engine's answers are compared with, and what must hold of its memory at any time."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, takewhile

import pytest
from torch import Tensor

from nemotron_h.config.engine import EngineConfig
from nemotron_h.grid import AHEAD
from nemotron_h.inference import naive
from nemotron_h.inference.drafts import Lookup
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.memory import Sizes
from nemotron_h.inference.request import Answer, Finish, Request
from nemotron_h.inference.sampling import Logprobs, Sampler, logprobs
from nemotron_h.inference.session import Session
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.state import AttentionState, MambaState, page_bytes, slot_bytes

Draws = Iterable[tuple[int, Tensor]]  # each new token, and the logits (vocab,) that it was drawn from


class Alone:
    """The answers of one model as they are without cache, batch or queue, each worked out once."""

    def __init__(self, model: Hybrid, *, most: int = 256) -> None:
        """most: prompts remembered. Each keeps a state, to draw further from."""
        self.model, self.most = model, most
        self._known: dict[object, Memoised] = {}

    def __call__(self, answer: Answer) -> tuple[list[int], list[Logprobs]]:
        request, hook = answer.request, answer.request.hook
        assert request.drawn_from is None  # a tensor is no key
        key = tuple(request.ids), replace(request.sampling, seed=request.sampling.seed + answer.index), hook
        known = self._known.pop(key, None) or Memoised(draws(self.model, request, answer.index), [])
        self._known[key] = known
        for oldest in list(self._known)[: -self.most]:
            del self._known[oldest]
        return as_asked(request, known)


@dataclass
class Memoised:
    """What an iterator gave, to be gone through again."""

    rest: Iterator[tuple[int, Tensor]]
    given: list[tuple[int, Tensor]]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        yield from self.given
        for one in self.rest:
            self.given.append(one)
            yield one


def alone(model: Hybrid, answer: Answer) -> tuple[list[int], list[Logprobs]]:
    """The tokens of a whole answer, and the log-probabilities of those drawn for it, as they are alone."""
    return as_asked(answer.request, draws(model, answer.request, answer.index))


def draws(model: Hybrid, request: Request, index: int) -> Iterator[tuple[int, Tensor]]:
    """Of a request's completion, without end."""
    sampling = replace(request.sampling, seed=request.sampling.seed + index)
    sampler = Sampler(sampling, prompt=request.ids, drawn_from=request.drawn_from, hook=request.hook)
    return naive.draws(model, request.ids, 2**31, sampler, ())


def as_asked(request: Request, draws: Draws) -> tuple[list[int], list[Logprobs]]:
    """Up to an end or to max_tokens; the tokens drawn before have no log-probabilities."""
    asked = list(takewhile(lambda draw: draw[0] not in request.ends, islice(draws, request.max_tokens)))
    new = asked[len(request.generated) :] if request.logprobs is not None else []
    return [token for token, _ in asked], [logprobs(row, token, request.logprobs or 0) for token, row in new]


def check_alone(model: Hybrid | Alone, *answers: Answer) -> None:
    """Each answer, as far as it came, is what it would have been alone: tokens and log-probabilities to the bit."""
    for answer in answers:
        check_answer(answer, *(model(answer) if isinstance(model, Alone) else alone(model, answer)))


def check_answer(answer: Answer, ids: list[int], chances: list[Logprobs]) -> None:
    """The answer is these whole tokens and log-probabilities, as far as it came, and ended as they do."""
    assert answer.ids == ids[: len(answer.ids)]
    assert answer.logprobs == chances[: len(answer.ids) - len(answer.request.generated)]
    if answer.finish not in (Finish.CANCELLED, Finish.TIME, None):
        whole = Finish.END if len(ids) < answer.request.max_tokens else Finish.LENGTH
        assert (answer.finish, len(answer.ids)) == (whole, len(ids)), answer.error


def budget(model: Hybrid, *, pages: int, snapshots: int, max_running: int, **settings: object) -> EngineConfig:
    """Settings that give room for exactly so many pages and snapshots, all poisoned when they are freed."""
    dtype = model.compute_dtype
    slot, page = slot_bytes(model.config, dtype), page_bytes(model.config, model.keys_values or dtype)
    rest = pages * page + snapshots * (slot + 4 * model.config.vocab_size) + max(page - 1, 0)
    config = EngineConfig(
        max_running=max_running,
        memory_bytes=max(1, (max_running + 1) * slot + rest),
        pages_fraction=(pages + 0.5) * page / rest if rest and snapshots else 0.5,
        max_snapshots=snapshots,
        poisoned=True,
        **settings,  # type: ignore[arg-type]
    )
    sizes = Sizes.of(model, config, 0)
    assert (sizes.pages, sizes.snapshots) == (pages if page else 0, snapshots), sizes
    return config


def erase(engine: Engine) -> None:
    """Fill storage that was never used with NaN too, as what is freed later will be."""
    state = engine.memory.state
    for slot in range(len(state)):
        state.poison_slot(slot)
    state.poison_pages(range(engine.memory.sizes.pages))


def check_erased(engine: Engine) -> None:
    """Nothing is left of what nobody holds. Of an engine that was erased when it was new."""
    memory, running = engine.memory, len(engine.scheduler.running)
    for layer in memory.state.layers:
        free = memory.pages.free
        if isinstance(layer, MambaState):
            free = [*range(running, memory.scratch + 1), *memory.prefixes.free]
        if isinstance(layer, MambaState | AttentionState):
            for field in fields(layer):
                left = getattr(layer, field.name)[free]
                assert (left.isnan() if left.is_floating_point() else left == -1).all(), field.name


def check_pinned(engine: Engine, sessions: Sequence[Session]) -> None:
    """Snapshots are held by those sessions, which are open, and by audits under way, and by nobody else."""
    audited = [sequence.audited for sequence in engine.scheduler.running if sequence.audited is not None]
    held = Counter([snapshot.slot for session in sessions for snapshot in session.held if snapshot.kept])
    held += Counter([snapshot.slot for snapshot in audited if snapshot.kept])
    for slot, snapshot in engine.memory.prefixes.snapshots.items():
        assert snapshot.pins == held[slot], snapshot.node.end


def check_conserved(engine: Engine) -> None:
    """Every slot and page is free or held, and held by those that are there, as often as they hold it."""
    memory, running = engine.memory, len(engine.scheduler.running)
    prefixes, state = memory.prefixes, memory.state
    slots = range(memory.scratch + 1, memory.scratch + 1 + memory.sizes.snapshots)
    assert sorted([*prefixes.free, *prefixes.snapshots]) == list(slots)
    assert memory.logits.keys() == {slot for slot, snapshot in prefixes.snapshots.items() if snapshot.answers}
    held = Counter(page for row in (*range(running), *prefixes.snapshots) for page in state.tables[row])
    assert memory.pages.holders == [held[page] for page in range(memory.sizes.pages)]
    assert sorted(memory.pages.free) == [page for page in range(memory.sizes.pages) if not held[page]]
    assert not any(state.tables[row] for row in (*range(running, memory.scratch + 1), *prefixes.free))
    for slot, snapshot in prefixes.snapshots.items():
        assert state.positions[slot] == snapshot.node.end
    for row, sequence in enumerate(engine.scheduler.running):
        assert 0 <= state.positions[row] <= len(sequence.tokens)
        assert not memory.sizes.pages or len(state.tables[row]) <= memory.promised[row]
    # whoever runs can have all that it was promised
    owed = sum(max(0, memory.promised[row] - len(state.tables[row])) for row in range(running))
    assert owed <= len(memory.pages.free)
    for snapshot in prefixes.snapshots.values():
        assert prefixes.along(snapshot.node.path, snapshot.node.salt)[-1:] == [snapshot]


def foretold(monkeypatch: pytest.MonkeyPatch, engine: Engine, alone: Alone, wrong: random.Random | None) -> None:
    """Let drafts be what is going to come, up to where `wrong` has it, and something else from there on."""

    def plan(lookups: Sequence[Lookup], tokens: Sequence[Sequence[int]], rooms: Sequence[int]) -> list[list[int]]:
        drafts = []
        for sequence, most in zip(engine.scheduler.running, rooms, strict=True):
            answer, room = sequence.answer, min(most, AHEAD)
            right = alone(answer)[0][len(answer.ids) :][:room]
            if wrong is not None:
                right = right[: wrong.randrange(room + 2)]
            drafts.append(right + [0] * (room - len(right)) if wrong is not None else right)
        return drafts

    monkeypatch.setattr(engine._drafts, "plan", plan)
