"""The serving loop: many requests at once, each answered as if it were alone, to the bit.

    add      a request joins the queue
    step     admit   who waits begins where the deepest snapshot of its prompt lies
             read    one call of the model: a portion of prompts, and everybody's next token
             keep    who has come to a place worth it leaves a snapshot there
             draw    who has read all its tokens is given the next

One arithmetic makes all of it invisible: how a prompt was cut, what it was read beside, what was reused, and whether it
was interrupted and read again. `naive.py` is what every answer equals.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from nemotron_h import machine
from nemotron_h.config.engine import EngineConfig
from nemotron_h.errors import CapacityError, RequestError
from nemotron_h.inference import naive
from nemotron_h.inference.drafts import Drafts
from nemotron_h.inference.memory import Memory
from nemotron_h.inference.prefix import Kind, Snapshot
from nemotron_h.inference.request import PRIVATE, Answer, Finish, News, Request, Update, check_ids, private_salt
from nemotron_h.inference.runner import read
from nemotron_h.inference.sampling import drawable, logprobs
from nemotron_h.inference.scheduler import Scheduler, calls
from nemotron_h.inference.sequence import Sequence as Running
from nemotron_h.inference.session import Session, Sessions
from nemotron_h.inference.store import Store
from nemotron_h.model import fingerprint
from nemotron_h.model.check import Arithmetic, start_up
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.recorded import Calls
from nemotron_h.ops.shapes import expect
from nemotron_h.text.tokenizer import Tokenizer

LOG = logging.getLogger(__name__)
ARITHMETIC_FILE = "arithmetic.json"  # of what was measured on this machine


class Engine:
    """Serves one model. Its methods are for one thread."""

    def __init__(
        self,
        model: Hybrid,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        """tokenizer None: ids in, ids out. arithmetic: whether one arithmetic holds here, for these shapes; None: it is
        measured, or known from the last time on this machine. Where it does not hold, only what was read in whole
        portions of a prompt's own grid is reused.

        Raises: CapacityError where the memory does not hold the running sequences; CheckpointError where another
        process has the folder of snapshots.
        """
        self.model, self.tokenizer, self.config = model, tokenizer, config or EngineConfig()
        self.arithmetic = arithmetic or start_up(model, machine.cache_folder() / ARITHMETIC_FILE)
        model.row_multiple = self.arithmetic.multiple
        if not self.arithmetic.holds:
            LOG.warning(
                "one arithmetic does not hold on this machine (%s): answers may depend on who is served beside them, "
                "only whole portions of prompts are reused, no folder of snapshots is, and nothing is read ahead",
                "; ".join(self.arithmetic.failures),
            )
        self.memory = Memory(model, self.config)
        self.scheduler = Scheduler(self.memory, self.config, exact=self.arithmetic.holds)
        self.counts = self.scheduler.counts
        # where text is wanted, only ids that stand for some are drawn: vocabularies are padded, and have holes
        known = tokenizer.known_ids if tokenizer is not None else None
        self._drawn_from = drawable(known, model.config.vocab_size)
        self._news = News()
        self._versions = fingerprint.Versions(model)
        self._calls = Calls(model, self.memory.state, recorded=self.arithmetic.holds)
        self._drafts = Drafts(self.config.drafts if self.arithmetic.holds else "off", model.row_multiple)
        self._sessions = Sessions(self.memory, model, tokenizer, exact=self.arithmetic.holds)
        if self.config.snapshot_folder is not None and self.arithmetic.holds:
            self._open_store(self.config.snapshot_folder)

    def add(self, request: Request) -> tuple[Answer, ...]:
        """Queue a request; its n answers grow with each step.

        Raises: RequestError, naming the field; CapacityError for what can never fit.
        """
        self.check(request)
        salt = request.cache_salt if request.reuse else None
        if salt is None and request.n > 1:
            salt = private_salt()  # they share what they read, with nobody else
        first = self.counts.requests + 1
        sequences = [
            Running.of(
                request,
                index,
                number=first + index,
                salt=salt,
                tokenizer=self.tokenizer,
                drawn_from=self._drawn_from,
            )
            for index in range(request.n)
        ]
        answers = tuple(sequence.answer for sequence in sequences)
        self.counts.requests += request.n
        self.scheduler.queue += sequences
        self._news.follow(answers)
        return answers

    def check(self, request: Request) -> None:
        """Refuse what `add` would."""
        vocab = self.model.config.vocab_size
        naive.check(self.model, request.ids, request.max_tokens)
        check_ids(request.generated, vocab, "generated")
        check_ids([token for token, _ in request.sampling.logit_bias], vocab, "logit_bias")
        if request.drawn_from is not None:
            expect(request.drawn_from, "drawn_from", (vocab,), torch.bool)
            known = self._drawn_from
            if not request.drawn_from.any() or (known is not None and (request.drawn_from.cpu() & ~known).any()):
                raise RequestError("drawn_from: must leave tokens to draw, and only such as the tokenizer knows")
        if request.stop and self.tokenizer is None:
            raise RequestError("stop: needs an engine with a tokenizer; got none; cut the ids yourself")
        if request.logprobs is not None and request.logprobs > vocab:
            raise RequestError(f"logprobs: must lie in 0..{vocab}; got {request.logprobs}")
        self.memory.check_fits(len(request.ids) + request.max_tokens - 1)

    def stream(self, request: Request) -> Iterator[Update]:
        """Add a request, now, and step until its answers have ended, giving what each step did to them. Others go on
        meanwhile; to close the stream cancels its own."""
        stream = self._stream(self.add(request))
        next(stream)  # into its `try`: a stream that is closed before it is read ends its request, too
        return stream

    def _stream(self, answers: tuple[Answer, ...]) -> Iterator[Update]:
        news = News(answers)
        try:
            yield Update(answers[0], None, "")
            while not news.over:
                yield from news.take()
                if any(answer.finish is None for answer in answers):
                    self.step()
        finally:
            for answer in answers:
                self.cancel(answer)

    @property
    def busy(self) -> bool:
        """Is anything under way?"""
        return bool(self.scheduler.running or self.scheduler.queue)

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.busy:
            self.step()

    def cancel(self, answer: Answer) -> None:
        """End an answer now; what it has stands. One that has ended stays as it is."""
        for sequence in (*self.scheduler.running, *self.scheduler.queue):
            if sequence.answer is answer:
                with self._all_or_nothing():
                    self._end(sequence, Finish.CANCELLED)

    def step(self) -> list[Update]:
        """Do one pass. Returns what was done to each answer since the last step.

        A step that is interrupted is done again by the next one, to the same bits: who was being read begins anew. What
        it was about to return is lost with it; `News` of your own, of the same answers, loses nothing.
        """
        scheduler = self.scheduler
        with self._all_or_nothing():
            self._notice_weights()
            self._draw()
            self._end_overdue()
            self._admit()
            counts, _ = scheduler.shares()
            for row, count in enumerate(counts):
                self.memory.extend(row, count)
            drafts = self._drafted(counts)
        if not counts:
            return self._news.take()
        try:
            rows = calls(counts, alone=not scheduler.exact)
            began = time.perf_counter()
            read(self._calls, scheduler.running, counts, rows, drafts, self._drafts.size)
            self._measure(counts, drafts, time.perf_counter() - began)
        except BaseException:
            with self._all_or_nothing():
                scheduler.retract()  # rows are half-written, and nothing else is
            raise
        with self._all_or_nothing():
            scheduler.read(counts)
            self._draw()
        return self._news.take()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """What ends in the middle of this leaves nothing of what was read: half a change of it would be trusted."""
        try:
            yield
        except BaseException:
            self.scheduler.reset()
            for sequence in list(self.scheduler.queue):
                if sequence.finish is not None:  # its last token had come
                    self._end(sequence, sequence.finish)
            raise

    def session(self, of: Answer | Sequence[int], *, salt: str = "", extra: Mapping[str, Any] | None = None) -> Session:
        """Hold what is known of an answer, as far as it has come, or of ids. salt: of ids. extra: plain values of your
        own, for its file."""
        self._notice_weights()
        if not isinstance(of, Answer):
            return self._sessions.held(of, salt=salt, extra=extra)
        if salt:
            raise RequestError(f"salt: must be left out for an answer, which has its request's; got {salt!r}")
        for row, sequence in enumerate(self.scheduler.running):
            if sequence.answer is of and self.scheduler.exact:
                self.scheduler.keep(row, sequence, Kind.REPLY, awaited=True)
        request = of.request
        return self._sessions.held(
            [*request.ids, *of.ids],
            salt=request.cache_salt,
            prompt_tokens=len(request.ids),
            sampling=replace(request.sampling, seed=request.sampling.seed + of.index),
            extra=extra,
        )

    def restore(self, path: str | Path, *, salt: str = "", inexact: bool = False) -> Session:
        """A session out of a file: what it holds is reused by requests of that salt.

        inexact: take one that another arithmetic computed, too; it has a salt of its own, and is marked.
        Raises: DataError where the file is damaged, of another model, or of another arithmetic; CapacityError.
        """
        self._notice_weights()
        return self._sessions.restored(Path(path), salt=salt, inexact=inexact)

    def close(self) -> None:
        """End everything under way, and leave what was read in the folder of snapshots, where there is one."""
        for sequence in (*self.scheduler.running, *self.scheduler.queue):
            self.cancel(sequence.answer)
        if self.scheduler.store is not None:
            for snapshot in sorted(self.memory.prefixes.snapshots.values(), key=self.memory.prefixes.worth):
                self._spill(snapshot)
        self._close_store()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _notice_weights(self) -> None:
        """Where weights have changed, what was read by the old ones is forgotten, and who runs begins again."""
        if self._versions.hold:
            return
        versions = fingerprint.Versions(self.model)
        with self._all_or_nothing():
            self.scheduler.retract()
            self.memory.forget()
        self._calls.forget()
        self._sessions = Sessions(self.memory, self.model, self.tokenizer, exact=self.arithmetic.holds)
        if self.scheduler.store is not None:
            LOG.warning("the weights have changed: the folder of snapshots is not used any more")
            self._close_store()
        self._versions = versions  # what is interrupted before is done again

    def _end_overdue(self) -> None:
        """End those whose time is up, and who was over when it was added: it goes on from a stop string."""
        now = time.perf_counter()
        for sequence in list(self.scheduler.queue):
            if (finish := sequence.finish) is not None:
                self._end(sequence, finish)
        for sequence in (*self.scheduler.running, *self.scheduler.queue):
            limit = sequence.answer.request.max_seconds
            if limit is not None and now - sequence.answer.added > limit:
                self._end(sequence, Finish.TIME)

    def _admit(self) -> None:
        """Let those begin who can. Whoever was read before to its last token is given the next at once."""
        while True:
            try:
                if self.scheduler.admit() is None:
                    return
            except CapacityError as error:
                self._end(self.scheduler.queue[0], Finish.ERROR, str(error))
            self._draw()

    def _drafted(self, counts: Sequence[int]) -> list[list[int]]:
        """What is read ahead of each in a pass of everybody's next token; nothing in any other."""
        if set(counts) != {1}:
            return [[] for _ in counts]
        pairs = list(zip(self.scheduler.running, self.scheduler.positions, strict=True))
        # who is still within a prompt is not about to draw
        rooms = [one.room_ahead(place) if place + 1 == len(one.tokens) else 0 for one, place in pairs]
        running = [one for one, _ in pairs]
        drafts = self._drafts.plan([one.lookup for one in running], [one.tokens for one in running], rooms)
        for one, draft in zip(running, drafts, strict=True):
            one.answer.drafted += len(draft)
            self.counts.drafted_tokens += len(draft)
        return drafts

    def _measure(self, counts: Sequence[int], drafts: Sequence[Sequence[int]], seconds: float) -> None:
        """Remember how long a pass of everybody's next token took, but for one that was made for the first time."""
        if set(counts) == {1} and not self._calls.new:
            self._drafts.measured(len(counts), sum(map(len, drafts)), seconds)

    def _draw(self) -> None:
        """Give those that have read all their tokens the next; and those after it, as long as they are what was read
        ahead."""
        scheduler = self.scheduler
        for sequence, position in list(zip(scheduler.running, scheduler.positions, strict=True)):
            if position == len(sequence.tokens):
                self._drawn(sequence)
                while sequence.ahead and sequence.answer.finish is None and sequence.ahead[0][0] == sequence.tokens[-1]:
                    scheduler.accept(sequence)
                    self._drawn(sequence)
                sequence.ahead = []

    def _drawn(self, sequence: Running) -> None:
        answer, request, logits = sequence.answer, sequence.answer.request, sequence.logits
        assert logits is not None
        try:
            token = sequence.sampler.draw(logits)
        except RequestError as error:
            self._end(sequence, Finish.ERROR, str(error))
            return
        if token in request.ends:
            self._end(sequence, Finish.END)
            return
        answer.begun = answer.begun or time.perf_counter()
        chances = None if request.logprobs is None else logprobs(logits, token, request.logprobs)
        sequence.take(token, chances)
        if sequence.finish is not None:
            self._end(sequence, sequence.finish)

    def _end(self, sequence: Running, finish: Finish, error: str | None = None) -> None:
        """A sequence leaves; what it has read stays for reuse."""
        sequence.end(finish, error)
        self.scheduler.leave(sequence, damaged=finish is Finish.ERROR)

    def _open_store(self, folder: Path) -> None:
        prints, arithmetic = self._sessions.prints, self._sessions.arithmetic
        store = Store(folder, self.config.snapshot_folder_bytes, prints, arithmetic)
        self.scheduler.store, self.memory.spill = store, self._spill

    def _spill(self, snapshot: Snapshot) -> None:
        """A snapshot goes to make room: the folder may keep it."""
        store, salt = self.scheduler.store, snapshot.node.salt
        long = snapshot.node.end >= self.config.portion_tokens
        worth_a_file = long and snapshot.answers and not salt.startswith(PRIVATE)
        if store is not None and worth_a_file:
            store.put(snapshot.node.path, salt, snapshot.kind, self.memory.saved([snapshot]))

    def _close_store(self) -> None:
        if self.scheduler.store is not None:
            self.scheduler.store.close()
            self.scheduler.store = None
