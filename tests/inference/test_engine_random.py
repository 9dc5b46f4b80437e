"""Random lives of an engine: whatever happens to it, in whatever order, its answers are those of `naive.py`.

After every event nothing is lost, or held twice, and what was freed is NaN. At the end of a life everything is let go.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from nemotron_h.config.engine import EngineConfig
from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import CapacityError
from nemotron_h.grid import BLOCK, ROWS
from nemotron_h.inference import engine as engine_module
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.load import PRECISIONS
from nemotron_h.inference.prefix import common
from nemotron_h.inference.request import PRIVATE, Answer, Finish, Request
from nemotron_h.inference.sampling import Logprobs
from nemotron_h.inference.session import Session
from nemotron_h.model import fingerprint
from nemotron_h.model.check import Arithmetic
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.state import MambaState, State
from nemotron_h.ops.segments import Segments
from nemotron_h.precision.weights import BITS
from tests.inference.serving import (
    Alone,
    budget,
    check_answer,
    check_conserved,
    check_erased,
    check_pinned,
    erase,
)
from tests.model import shapes

Build = Callable[..., Hybrid]

# Prompts are cut from these, so that many begin alike.
STREAMS = [torch.randint(2**30, (2000,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(4)]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=0.8, top_k=5, repetition_penalty=1.3),
    Sampling(temperature=1.2, top_p=0.8, frequency_penalty=0.5, presence_penalty=0.5),
    Sampling(temperature=1.5, min_p=0.1, logit_bias=((3, 2.0),)),
]
PATIENCE = 100.0  # seconds that a request with a limit waits
ENOUGH = 3000  # steps: no life has work for more
LONG = 10  # events, before an engine is lost
MOST_SESSIONS = 3


def only_even(generated: Sequence[int], logits: Tensor) -> Tensor:
    logits[1::2] = -torch.inf
    return logits


def hardly_the_last(generated: Sequence[int], logits: Tensor) -> Tensor:
    """A hook that depends on what was drawn before."""
    if generated:
        logits[generated[-1]] -= 5
    return logits


WAYS = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 10),
        "sampling": st.builds(replace, st.sampled_from(SAMPLINGS), seed=st.integers(0, 2)),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "ends": st.sampled_from([(), (), range(0, 352, 5)]),
        "logprobs": st.sampled_from([2, 0, None]),
        "hook": st.sampled_from([None, None, only_even, hardly_the_last]),
        "cache_salt": st.sampled_from(["", "", "other"]),
        "reuse": st.sampled_from([True, True, True, True, False]),
        "max_seconds": st.sampled_from([None, None, PATIENCE]),
    }
)
ANY = st.integers(0, 7)  # which of several, counted from the latest
LENGTHS = st.integers(1, 700) | st.sampled_from([1, 2, 3, 63, 64, 65, 128, 129, 255, 256, 257, 512, 513])
PROMPTS = st.fixed_dictionaries({"stream": st.integers(0, 3), "length": LENGTHS, "boundary": LENGTHS})
PORTIONS = st.integers(1, 130) | st.sampled_from([32, 64, 96, 100, 128])


class Interrupted(Exception):
    """What a step was stopped by."""


@contextmanager
def interrupted(owner: Any, name: str, *, late: bool) -> Iterator[None]:
    """Calls of this function end by an exception, before they do anything, or after all of it."""
    whole = getattr(owner, name)

    def broken(*args: Any, **options: Any) -> Any:
        if late:
            whole(*args, **options)
        raise Interrupted

    with mock.patch.object(owner, name, broken):
        yield


class Life(RuleBasedStateMachine):
    """What may happen to an engine."""

    model: Hybrid
    alone: Alone
    arithmetic: dict[str, Any]  # its fingerprint, which takes longer than most events
    measured = Arithmetic(True, ROWS, (), 0.0)
    events = 0  # of all lives

    @initialize(
        pages=st.integers(2, 5) | st.integers(2, 9),
        snapshots=st.integers(0, 8) | st.just(8),
        max_running=st.integers(1, 5),
        portion_tokens=PORTIONS,
        audit_fraction=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
        drafts=st.sampled_from(["auto", "always", "off"]),
        remembered_tokens=st.sampled_from([200, 2**22]),
        with_folder=st.booleans(),
    )
    def begin(self, *, remembered_tokens: int, with_folder: bool, **sizes: Any) -> None:
        self.remembered_tokens = remembered_tokens
        self.left_open = ExitStack()
        self.folder = Path(self.left_open.enter_context(tempfile.TemporaryDirectory()))
        self.fast = 0.0  # seconds
        clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + self.fast)
        self.left_open.enter_context(mock.patch.object(engine_module, "time", clock))
        self.left_open.enter_context(mock.patch.object(fingerprint, "arithmetic", lambda model: self.arithmetic))
        self.config = budget(self.model, **sizes, snapshot_folder=self.folder / "snapshots" if with_folder else None)
        self.longest = 10 * self.config.portion_tokens + 20  # a prompt takes few passes
        self.answers: list[Answer] = []  # all of them
        self.awaited: list[Answer] = []  # those that have not ended
        self.told: dict[Answer, list[int]] = {}  # tokens that steps have named
        self.sessions: list[Session] = []
        self.asked: dict[Session, Request] = {}
        self.restored: dict[str, list[list[int]]] = {"": [], "other": []}  # by salt
        self.start()

    # what is asked

    @rule(prompt=PROMPTS, ways=WAYS)
    def ask(self, prompt: dict[str, int], ways: dict[str, Any]) -> None:
        self.add(self.asked_with(**prompt, **ways))

    @precondition(lambda self: self.answers)
    @rule(which=ANY, how=st.sampled_from(["again", "otherwise", "further", "edited"]), place=LENGTHS, ways=WAYS)
    def ask_what_resembles(self, which: int, how: str, place: int, ways: dict[str, Any]) -> None:
        """An earlier request again, its prompt in another way, the next turn after its answer, or its prompt edited."""
        answer = self.latest(self.answers, which)
        ids = [*answer.request.ids]
        if how == "again":
            self.add(answer.request)
        elif how == "otherwise":
            self.add(Request(ids=ids, **ways))
        elif how == "further":
            turn = [*ids, *answer.ids]
            self.add(Request(ids=[*turn, *self.ids(STREAMS[0][: place % 70])], boundaries=[len(turn)], **ways))
        else:
            ids[place % len(ids)] ^= 1
            self.add(Request(ids=self.ids(ids), **ways))

    @precondition(lambda self: self.answers)
    @rule(which=ANY, kept=st.integers(0, 10), more=st.integers(1, 5))
    def go_on_within_an_answer(self, which: int, kept: int, more: int) -> None:
        answer = self.latest(self.answers, which)
        request, kept = answer.request, min(kept, len(answer.ids))
        sampling = replace(request.sampling, seed=request.sampling.seed + answer.index)
        said = answer.ids[:kept]
        self.add(replace(request, generated=said, max_tokens=kept + more, sampling=sampling, n=1))

    # what happens to it

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            for update in self.engine.step():
                if update.answer in self.told and update.token is not None:
                    self.told[update.answer].append(update.token)

    @precondition(lambda self: self.engine.busy)
    @rule()
    def step_until_somebody_leaves(self) -> None:
        before = len(self.engine.scheduler.running) + len(self.engine.scheduler.queue)
        while len(self.engine.scheduler.running) + len(self.engine.scheduler.queue) == before:
            self.step(1)

    @precondition(lambda self: self.awaited)
    @rule(which=ANY)
    def cancel(self, which: int) -> None:
        self.engine.cancel(self.latest(self.awaited, which))

    @precondition(lambda self: self.awaited)
    @rule()
    def time_is_up(self) -> None:
        self.fast = PATIENCE + 1
        self.step(1)
        self.fast = 0.0
        assert all(answer.finish for answer in self.awaited if answer.request.max_seconds)

    @precondition(lambda self: self.measured.holds and self.engine.busy)
    @rule(layer=st.integers(0, 8), late=st.booleans())
    def a_pass_is_interrupted(self, layer: int, late: bool) -> None:
        layers = self.model.layers
        with interrupted(layers[layer % len(layers)], "forward", late=late), suppress(Interrupted):
            while self.engine.busy:
                self.engine.step()
        self.told.clear()

    @precondition(lambda self: self.measured.holds)
    @rule()
    def the_weights_are_written_again(self) -> None:
        with torch.no_grad():
            next(self.model.parameters()).mul_(1)

    @precondition(lambda self: self.age > LONG)
    @rule(kindly=st.sampled_from([True, True, False]))
    def another_process_goes_on(self, kindly: bool) -> None:
        if kindly:
            self.engine.close()
        elif self.engine.scheduler.store is not None:
            self.engine.scheduler.store.close()
        self.check_answers()
        self.start()

    # what is held

    @precondition(lambda self: len(self.sessions) < MOST_SESSIONS)
    @rule(prompt=PROMPTS, ways=WAYS, drawn=st.integers(0, 10))
    def hold_an_answer(self, prompt: dict[str, int], ways: dict[str, Any], drawn: int) -> None:
        """As soon as it has so many tokens, or has ended."""
        for answer in self.add(self.asked_with(**prompt, **ways))[:1]:
            while answer.finish is None and len(answer.ids) < drawn:
                self.step(1)
            self.hold(self.engine.session(answer), answer.request)

    @precondition(lambda self: self.answers and len(self.sessions) < MOST_SESSIONS)
    @rule(which=ANY, length=LENGTHS | st.none())
    def hold_what_is_known(self, which: int, length: int | None) -> None:
        """Of an earlier answer, or of the beginning of its prompt."""
        answer = self.latest(self.answers, which)
        if length is None:
            self.hold(self.engine.session(answer), answer.request)
        else:
            ids = answer.request.ids[:length]
            self.hold(self.engine.session(ids, salt=answer.request.cache_salt), Request(ids=ids))

    @precondition(lambda self: self.sessions)
    @rule(which=ANY, more=st.integers(1, 6))
    def go_on_from_a_session(self, which: int, more: int) -> None:
        session = self.latest(self.sessions, which)
        hook, drawn = self.asked[session].hook, len(session.ids) - session.prompt_tokens
        self.add(session.request(max_tokens=drawn + more, hook=hook, logprobs=1))

    @precondition(lambda self: self.sessions)
    @rule(which=ANY, how=st.sampled_from(["fork", "rewind", "close"]), place=ANY)
    def change(self, which: int, how: str, place: int) -> None:
        session = self.latest(self.sessions, which)
        if how == "fork":
            self.hold(session.fork(), self.asked[session])
        elif how == "close":
            self.sessions.remove(session)
            session.close()
        elif session.places:
            session.rewind(self.latest(session.places, place))

    @precondition(lambda self: self.age > LONG and self.sessions)
    @rule(which=ANY)
    def everything_is_lost_but_a_file(self, which: int) -> None:
        session = self.latest(self.sessions, which)
        session.save(self.folder / "session")
        self.another_process_goes_on(kindly=False)
        restored = self.engine.restore(self.folder / "session", salt=session.salt)
        assert (restored.ids, restored.prompt_tokens) == (session.ids, session.prompt_tokens)
        assert restored.places == session.places
        self.hold(restored, self.asked[session])

    @precondition(lambda self: self.sessions)
    @rule(which=ANY, salt=st.sampled_from(["", "other"]))
    def restore_beside_others(self, which: int, salt: str) -> None:
        session = self.latest(self.sessions, which)
        session.save(self.folder / "session")
        try:
            restored = self.engine.restore(self.folder / "session", salt=salt)
        except CapacityError:
            return
        self.restored[salt].append(restored.ids)
        self.hold(restored, self.asked[session])

    # what always holds

    @invariant()
    def everything_is_as_it_should_be(self) -> None:
        type(self).events += 1
        self.age += 1
        self.check_answers()
        self.check_memory()

    def teardown(self) -> None:
        if not hasattr(self, "left_open"):
            return
        with self.left_open:
            if sys.exc_info()[0] is None:
                self.check_the_end()
            if self.engine.scheduler.store is not None:
                self.engine.scheduler.store.close()

    def check_answers(self) -> None:
        """Those that have ended, and none is lost."""
        scheduler = self.engine.scheduler
        under_way = [sequence.answer for sequence in (*scheduler.running, *scheduler.queue)]
        assert {id(answer) for answer in under_way} == {id(one) for one in self.awaited if one.finish is None}
        for answer in [answer for answer in self.awaited if answer.finish is not None]:
            self.awaited.remove(answer)
            self.check_answer(answer)

    def check_answer(self, answer: Answer) -> None:
        if answer.finish is Finish.ERROR:  # a request never holds up itself
            assert answer.error is not None
            assert answer.error.startswith("pages: too few are free")
            assert self.sessions
            answer = replace(answer, finish=Finish.CANCELLED)
        check_answer(answer, *self.as_it_should_be(answer))
        self.check_salt(answer)
        new = answer.ids[len(answer.request.generated) :]
        assert self.told.pop(answer, new) == new

    def as_it_should_be(self, answer: Answer) -> tuple[list[int], list[Logprobs]]:
        return self.alone(answer)

    def check_salt(self, answer: Answer) -> None:
        """No more of a prompt is known than others of its salt had in common with it."""
        salt, reuse = answer.request.cache_salt, answer.reuse
        if reuse is not None and reuse.matched:
            others = [one for one in self.answers if one is not answer and one.request.cache_salt == salt]
            known = [*self.restored[salt], *([*one.request.ids, *one.ids] for one in others)]
            asked = np.array([*answer.request.ids, *answer.request.generated])
            assert reuse.reused <= reuse.matched <= max((common(asked, np.array(ids)) for ids in known), default=0)

    def check_memory(self) -> None:
        check_conserved(self.engine)
        check_erased(self.engine)
        check_pinned(self.engine, self.sessions)
        assert self.engine.memory.distrusted is None

    def check_the_end(self) -> None:
        """Everything is answered, every snapshot is good, and everything is let go."""
        self.drain()
        for session in self.sessions:
            session.close()
        self.sessions = []
        memory = self.engine.memory
        for node in [snapshot.node for snapshot in memory.prefixes.snapshots.values()]:
            if not node.salt.startswith(PRIVATE):
                self.add(Request(ids=node.path.tolist(), cache_salt=node.salt, max_tokens=2, logprobs=1))
                self.drain()
        memory.forget()
        self.check_memory()
        assert len(memory.pages.free) == memory.sizes.pages
        assert len(memory.prefixes.free) == memory.sizes.snapshots

    def drain(self) -> None:
        for _ in range(ENOUGH):
            if not self.engine.busy:
                break
            self.step(1)
        assert not self.engine.busy
        self.everything_is_as_it_should_be()

    def start(self) -> None:
        """A new engine, that knows of nothing."""
        self.engine = Engine(self.model, config=self.config, arithmetic=self.measured)
        self.engine.memory.prefixes.remembered_tokens = self.remembered_tokens
        erase(self.engine)
        self.awaited, self.sessions, self.age = [], [], 0
        self.told.clear()

    def add(self, request: Request) -> list[Answer]:
        pages = -(-(len(request.ids) + request.max_tokens - 1) // BLOCK)
        try:
            answers = self.engine.add(request)
        except CapacityError:
            assert pages > self.engine.memory.sizes.pages
            return []
        self.answers += answers
        self.awaited += answers
        self.told |= {answer: [] for answer in answers}
        return list(answers)

    def asked_with(self, *, stream: int, length: int, boundary: int, **ways: Any) -> Request:
        length = min(length, self.longest)
        boundaries = [boundary] if boundary <= length else []
        return Request(ids=self.ids(STREAMS[stream][:length]), boundaries=boundaries, **ways)

    def hold(self, session: Session, request: Request) -> None:
        self.sessions.append(session)
        self.asked[session] = request

    def ids(self, tokens: Sequence[int]) -> list[int]:
        return [token % self.model.config.vocab_size for token in tokens]

    @staticmethod
    def latest(several: Sequence[Any], which: int) -> Any:
        return several[-1 - which % len(several)]


class InexactLife(Life):
    """Where bits depend on how a prompt is cut, an answer is that of the same engine without reuse or neighbours."""

    measured = Arithmetic(False, ROWS, ("it is made so",), 0.0)
    cold: ClassVar[dict[object, tuple[list[int], list[Logprobs]]]] = {}  # answers that were worked out

    def as_it_should_be(self, answer: Answer) -> tuple[list[int], list[Logprobs]]:
        key = repr(answer.request), answer.index, self.config.portion_tokens
        if key not in self.cold:
            self.cold[key] = self.read_cold(answer)
        return self.cold[key]

    def read_cold(self, answer: Answer) -> tuple[list[int], list[Logprobs]]:
        config = budget(
            self.model, pages=10, snapshots=0, max_running=1, portion_tokens=self.config.portion_tokens, reuse=False
        )
        sampling = replace(answer.request.sampling, seed=answer.request.sampling.seed + answer.index)
        cold = Engine(self.model, config=config, arithmetic=self.measured)
        (whole,) = cold.add(replace(answer.request, n=1, sampling=sampling, max_seconds=None))
        cold.run()
        return whole.ids, whole.logprobs

    @invariant()
    def what_is_reused_lies_on_whole_portions(self) -> None:
        portion = self.config.portion_tokens
        places = [snapshot.node.end for snapshot in self.engine.memory.prefixes.snapshots.values()]
        places += [answer.reuse.reused for answer in self.answers if answer.reuse is not None]
        assert not any(place % portion for place in places)


def live(life: type[Life], model: Hybrid, *, lives: int, events: int = 40) -> int:
    """Random lives; how many events they had."""
    known = {
        "model": model,
        "alone": Alone(model),
        "arithmetic": fingerprint.arithmetic(model),
        "measured": replace(life.measured, multiple=model.row_multiple),
    }
    own = type(life.__name__, (life,), known)
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        own, settings=settings(max_examples=lives, stateful_step_count=events, suppress_health_check=slow)
    )
    return own.events  # type: ignore[attr-defined, no-any-return]


def with_bits_of_its_cuts(model: Hybrid) -> Hybrid:
    """The model, where its state depends on how a prompt was cut, and on what it was read beside, as it does in any
    other arithmetic than ours."""
    whole = model.hidden

    def hidden(tokens: Tensor, segments: Segments, state: State, *rest: Any) -> Tensor:
        out = whole(tokens, segments, state, *rest)
        for row, (start, length) in enumerate(zip(segments.starts, segments.lengths, strict=True)):
            for layer in state.layers:
                if length > 1 and isinstance(layer, MambaState):
                    layer.conv[row] *= 1 + (7 * start + 3 * length + 5 * len(segments)) % 64 / 64
        return out

    model.hidden = hidden  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(("precision", "lives"), [("float32", 12), ("bfloat16", 12), ("int8", 4), ("int4", 8)])
def test_the_answers_of_any_life_are_those_of_a_plain_loop(build: Build, precision: str, lives: int) -> None:
    live(Life, build(precision=precision), lives=lives)


@pytest.mark.parametrize("name", ["t-8b", "ssm", "tied"])
def test_so_they_are_without_mamba_or_attention_and_at_odd_widths(name: str) -> None:
    """RoPE and two KV heads; one group; heads of 24 and a tied head."""
    live(Life, shapes.model(name), lives=4)


@pytest.mark.parametrize("precision", ["bfloat16", "int4"])
def test_so_they_are_with_keys_and_values_in_int8(build: Build, precision: str) -> None:
    model = build(precision=precision)
    model.keys_values = torch.int8
    live(Life, model, lives=3)


def test_where_bits_depend_on_cuts_answers_are_those_of_the_engine_alone(build: Build) -> None:
    live(InexactLife, with_bits_of_its_cuts(build()), lives=5)


def test_bits_that_depend_on_cuts_show(build: Build) -> None:
    """Else the test above would compare nothing."""
    model = with_bits_of_its_cuts(build())
    request = Request(ids=[token % shapes.VOCAB for token in STREAMS[0][:300]], max_tokens=2, logprobs=0)
    answers = []
    for portion in (64, 96):
        config = EngineConfig(memory_bytes=4_000_000, portion_tokens=portion)
        engine = Engine(model, config=config, arithmetic=InexactLife.measured)
        answers += engine.add(request)
        engine.run()
    assert answers[0].logprobs != answers[1].logprobs


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_ten_thousand_events(build: Build, precision: str) -> None:
    assert live(Life, build(precision=precision), lives=220, events=60) > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["t-8b", "ssm", "tied"])
def test_thousands_of_events_of_other_shapes(name: str, precision: str) -> None:
    if precision in BITS:
        model = shapes.in_integers(deepcopy(shapes.model(name)), precision)
    else:
        model = shapes.model(name, PRECISIONS[precision])
    assert live(Life, model, lives=80, events=60) > 3_000


@pytest.mark.slow
def test_thousands_of_events_where_bits_depend_on_cuts(build: Build) -> None:
    assert live(InexactLife, with_bits_of_its_cuts(build()), lives=100, events=60) > 5_000
