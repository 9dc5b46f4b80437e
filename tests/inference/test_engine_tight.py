"""Where memory is just enough, and where something ends in the middle."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import CapacityError, RequestError
from nemotron_h.inference import session_file
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.request import Answer, Finish, News, Request, Update
from nemotron_h.inference.sampling import drawable
from nemotron_h.inference.session import Session
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.text.tokenizer import Tokenizer
from tests.inference.serving import budget, check_alone, check_conserved, erase
from tests.inference.test_engine import answered, ids
from tests.model import shapes

Build = Callable[..., Hybrid]


def tight(model: Hybrid, tokenizer: Tokenizer | None = None, **sizes: Any) -> Engine:
    engine = Engine(model, tokenizer, config=budget(model, **{"max_running": 1, "portion_tokens": 96, **sizes}))
    erase(engine)
    return engine


def held(engine: Engine, request: Request) -> Session:
    return engine.session(answered(engine, request)[0])


def test_a_request_is_not_kept_out_by_the_snapshot_that_it_would_begin_at(build: Build) -> None:
    """Its half page is copied: with the original that is one page more than there are."""
    engine = tight(build(), pages=2, snapshots=4)
    for max_tokens in (1, 3, 1, 5):
        (answer,) = answered(engine, Request(ids=ids(300), max_tokens=max_tokens, logprobs=0))
        assert answer.finish is Finish.LENGTH, answer.error
        check_alone(engine.model, answer)
    check_conserved(engine)


@pytest.mark.parametrize("pages", [2, 3, 4])
def test_an_audit_takes_no_page_that_is_promised(build: Build, pages: int) -> None:
    engine = tight(build(), pages=pages, snapshots=4, audit_fraction=1.0)
    for _ in range(3):
        check_alone(engine.model, *answered(engine, Request(ids=ids(300), max_tokens=3, logprobs=0)))
        check_conserved(engine)
    assert engine.memory.distrusted is None


def test_of_a_session_that_does_not_fit_nothing_stays(build: Build, tmp_path: Path) -> None:
    """Its deepest snapshot finds no room; where it does, others are left out."""
    model = build()
    whole = tight(model, pages=8, snapshots=8)
    held(whole, Request(ids=ids(300), max_tokens=1, boundaries=[100, 200])).save(tmp_path / "s")
    engine = tight(model, pages=8, snapshots=2)
    other = held(engine, Request(ids=ids(50, seed=1), max_tokens=1))
    session = engine.restore(tmp_path / "s")
    assert session.places == [300]
    session.close()
    check_conserved(engine)
    other.close()
    engine = tight(model, pages=8, snapshots=1)
    held(engine, Request(ids=ids(50, seed=1), max_tokens=1))
    with pytest.raises(CapacityError, match=r"^session: needs a slot for a snapshot; none is free, or can be made so"):
        engine.restore(tmp_path / "s")
    (answer,) = answered(engine, Request(ids=ids(150), max_tokens=4, logprobs=0))
    check_alone(model, answer)
    check_conserved(engine)


def test_a_restored_session_holds_a_place_that_was_known_as_another_kind(build: Build, tmp_path: Path) -> None:
    model = build()
    saved = held(tight(model, pages=8, snapshots=4), Request(ids=ids(192), max_tokens=1))
    saved.save(tmp_path / "s")
    engine = tight(model, pages=8, snapshots=8)
    answered(engine, Request(ids=ids(300), max_tokens=1))  # leaves a snapshot at 192, on the way
    assert engine.restore(tmp_path / "s").places == saved.places == [192]


def test_a_prompt_is_known_however_little_is_remembered(build: Build) -> None:
    engine = tight(build(), pages=8, snapshots=4)
    engine.memory.prefixes.remembered_tokens = 100
    for seed in range(5):
        request = Request(ids=ids(90, seed=seed), max_tokens=1)
        again = [answered(engine, request)[0].reuse for _ in range(2)][1]
        assert again is not None
        assert again.reused == 90
        check_conserved(engine)


def test_an_interrupted_step_tells_later_what_was_drawn_in_it(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole hit draws its first token before anything is read."""
    model = build()
    engine = tight(model, pages=8, snapshots=4)
    request = Request(ids=ids(90), max_tokens=4)
    (first,) = answered(engine, request)
    stream = engine.stream(request)
    with monkeypatch.context() as patch:
        patch.setattr(model.backbone.layers[0], "forward", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert [update.token for update in stream] == [*first.ids, None]


def test_a_stream_that_is_closed_before_it_was_read_cancels_its_request(build: Build) -> None:
    engine = tight(build(), pages=8, snapshots=4)
    stream = engine.stream(Request(ids=ids(40), max_tokens=60))
    stream.close()  # type: ignore[attr-defined]
    assert not engine.busy


def test_more_log_probabilities_than_there_are_tokens_are_refused_before_anything_is_read(build: Build) -> None:
    engine = tight(shapes.model("ssm"), pages=0, snapshots=2)
    with pytest.raises(RequestError, match=r"^logprobs: "):
        engine.add(Request(ids=[1, 2], max_tokens=2, logprobs=shapes.VOCAB + 1))
    assert not engine.busy


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_writing_to_the_folder_of_snapshots_may_be_interrupted(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Ctrl-C comes while the disk is slow."""
    model, written = build(), 0
    write = session_file.write

    def interrupted(*args: Any) -> None:
        nonlocal written
        written += 1
        if written == nth:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(session_file, "write", interrupted)
    engine = tight(model, pages=7, snapshots=2, max_running=2, snapshot_folder=tmp_path, audit_fraction=1.0)
    answers = []
    for seed in (1, 2, 1, 3, 2, 1):
        answers += engine.add(Request(ids=ids(280 + 10 * seed, seed=seed), max_tokens=4, logprobs=0))
    interruptions = 0
    while engine.busy:
        try:
            engine.step()
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 1
    check_alone(model, *answers)
    check_conserved(engine)
    assert not any(snapshot.pins for snapshot in engine.memory.prefixes.snapshots.values())


@pytest.mark.parametrize("nth", range(1, 6))
@pytest.mark.parametrize("name", ["copy_slot", "copy_page"])
def test_copying_may_be_interrupted(build: Build, monkeypatch: pytest.MonkeyPatch, name: str, nth: int) -> None:
    model = build()
    engine = tight(model, pages=7, snapshots=2, max_running=2)
    whole, called = getattr(engine.memory.state, name), 0

    def interrupted(self: Any, *args: int) -> None:
        nonlocal called
        called += 1
        whole(*args)
        if called == nth:
            raise KeyboardInterrupt

    monkeypatch.setattr(type(engine.memory.state), name, interrupted)
    answers = []
    for seed in (1, 2, 1, 3, 1, 1):
        answers += engine.add(Request(ids=ids(280 + 10 * seed, seed=seed), max_tokens=4, logprobs=0))
    while engine.busy:
        with suppress(KeyboardInterrupt):
            engine.step()
    check_alone(model, *answers)
    check_conserved(engine)


class Lines:
    """Notes the engine's lines that run, and ends the one of that number by Ctrl-C."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.run, self.interrupted = last, list[tuple[str, int]](), False  # function and line of each

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(str(FOLDER)):
            return None
        if event == "line":
            self.run.append((frame.f_code.co_qualname, frame.f_lineno))
            if len(self.run) == self.last:
                raise KeyboardInterrupt
        return self.trace

    @contextmanager
    def traced(self) -> Iterator[None]:
        before = sys.gettrace()  # of what measures which lines tests run
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(before)


FOLDER = Path(session_file.__file__).parent
OF_TOKENS = {"Sequence.take", "Sequence.end", "Engine._drawn", "Engine._end", "Scheduler.leave"}
OF_FILES = {"Store.put", "Store._taken", "Store._remove", "Store.get"}


class Interrupted:
    """One life of an engine: hits, audits, evictions to a folder, completions and sequences that wait. Its answers are
    known without a Ctrl-C, and with one the same, but for one that is cancelled after it."""

    def __init__(self, model: Hybrid, tokenizer: Tokenizer, folder: Path, *seeds: int) -> None:
        self.model, self.tokenizer, self.folder, self.seeds = model, tokenizer, folder, seeds
        self.drawn_from = drawable(tokenizer.known_ids, model.config.vocab_size)
        self.ends, self.stop = list[int](), list[str]()
        whole = self.live(Lines(), folder / "whole")
        check_alone(model, *whole)
        assert any(answer.text[answer.certain[-1] :] for answer in whole)  # held back to the end
        self.ends, self.stop, self.lines = whole[0].ids[2:3], [whole[-1].text[1:2]], Lines()
        self.known = self.live(self.lines, folder / "known")
        assert {answer.finish for answer in self.known} >= {Finish.END, Finish.STOP}

    def check(self, last: int) -> None:
        """With a Ctrl-C at that line."""
        lines = Lines(last)
        answers = self.live(lines, self.folder / str(last))
        assert lines.interrupted
        for answer, known in zip(answers, self.known, strict=True):
            if answer.finish is Finish.CANCELLED:
                check_alone(self.model, answer)
                continue
            for name in ("ids", "text", "certain", "logprobs", "finish", "error"):
                assert getattr(answer, name) == getattr(known, name), name

    def live(self, lines: Lines, folder: Path) -> list[Answer]:
        sizes = {"pages": 7, "snapshots": 2, "max_running": 2, "snapshot_folder_bytes": 300_000}
        answers, told = list[Answer](), list[Update]()
        with tight(self.model, tokenizer=self.tokenizer, snapshot_folder=folder, audit_fraction=0.5, **sizes) as engine:
            for seed in self.seeds:
                request = Request(
                    ids=ids(280 + 10 * seed, seed=seed),
                    max_tokens=4,
                    ends=self.ends,
                    stop=self.stop,
                    sampling=Sampling(temperature=2.5, frequency_penalty=0.5, seed=seed),
                    n=1 + (seed == 2),
                    drawn_from=self.drawn_from,
                    logprobs=0,
                )
                answers += engine.add(request)
            news = News(answers)
            while engine.busy:
                try:
                    with lines.traced():
                        engine.step()
                except KeyboardInterrupt:
                    lines.interrupted = True
                    engine.cancel(answers[len(lines.run) % len(answers)])
                told += news.take()
            check_conserved(engine)
            assert not any(snapshot.pins for snapshot in engine.memory.prefixes.snapshots.values())
        for answer in answers:
            own = [update for update in told if update.answer is answer]
            assert [update.token for update in own] == [*answer.ids, None]
            assert "".join(update.text for update in own) == answer.text
        return answers


@pytest.mark.parametrize(
    ("functions", "seeds"), [(OF_TOKENS, (1, 2)), (OF_FILES, (1, 2, 1, 3, 2, 1))], ids=["tokens", "files"]
)
def test_ctrl_c_may_come_at_any_line_that_changes(
    build: Build, tokenizer: Tokenizer, tmp_path: Path, functions: set[str], seeds: Sequence[int]
) -> None:
    life = Interrupted(build(), tokenizer, tmp_path, *seeds)
    whole = list(enumerate(life.lines.run, 1))
    order = whole if functions is OF_TOKENS else reversed(whole)  # the last token; the first file, which others read
    lines = {line: number for number, line in order if line[0] in functions}
    assert {function for function, _ in lines} == functions
    for number in lines.values():
        life.check(number)


@pytest.mark.slow
def test_ctrl_c_may_come_at_any_line_of_a_step(build: Build, tokenizer: Tokenizer, tmp_path: Path) -> None:
    life = Interrupted(build(), tokenizer, tmp_path, 1, 2, 1, 3, 2, 1)
    for number in random.Random(1).sample(range(1, len(life.lines.run)), 400):
        life.check(number)
