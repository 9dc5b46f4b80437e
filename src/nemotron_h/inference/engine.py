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
import random
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemotron_h.config.engine import EngineConfig
from nemotron_h.errors import RequestError
from nemotron_h.grid import CHUNK
from nemotron_h.inference import naive
from nemotron_h.inference.memory import Memory
from nemotron_h.inference.prefix import Cut, Kind, Match, Snapshot, common
from nemotron_h.inference.request import Answer, Finish, Request, Reuse, Update
from nemotron_h.inference.runner import read
from nemotron_h.inference.sampling import Sampler, drawable, logprobs
from nemotron_h.inference.scheduler import Sequence, calls, grid_shares, shares
from nemotron_h.inference.session import Session, Sessions
from nemotron_h.model import fingerprint
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.text.stream import StopStrings, TextStream
from nemotron_h.text.tokenizer import Tokenizer

LOG = logging.getLogger(__name__)
WORTH_WAITING = CHUNK  # tokens that another request is about to read: fewer are read twice rather than waited for


@dataclass(slots=True)
class Counts:
    """What an engine has done so far. prompt_tokens = reused_tokens + the sum of lost_tokens."""

    requests: int = 0
    passes: int = 0
    read_tokens: int = 0  # of prompts, drawn ones, and those read again
    prompt_tokens: int = 0
    matched_tokens: int = 0
    reused_tokens: int = 0
    lost_tokens: Counter[Cut] = field(default_factory=Counter)  # of prompts, by why they were not reused
    audits: int = 0


class Engine:
    """Serves one model. Its methods are for one thread."""

    def __init__(
        self,
        model: Hybrid,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        exact: bool = True,
    ) -> None:
        """tokenizer None: ids in, ids out. exact: one arithmetic holds here; where it does not, only what was read in
        whole portions of a prompt's own grid is reused.

        Raises: CapacityError where the memory does not hold the running sequences.
        """
        self.model, self.tokenizer, self.config = model, tokenizer, config or EngineConfig()
        self.exact = exact
        self.memory = Memory(model.config, self.config, model.compute_dtype, model.head_weight.device)
        self.counts = Counts()
        self.running: list[Sequence] = []  # in the order of rows
        self.queue: deque[Sequence] = deque()
        # where text is wanted, only ids that stand for some are drawn: vocabularies are padded, and have holes
        known = tokenizer.known_ids if tokenizer is not None else None
        self._drawn_from = drawable(known, model.config.vocab_size)
        self._listeners: dict[Answer, deque[Update]] = {}
        self._audits = random.Random(0)
        self._sessions = Sessions(self.memory, model, tokenizer)
        self._versions = fingerprint.versions(model)

    def add(self, request: Request) -> tuple[Answer, ...]:
        """Queue a request; its n answers grow with each step.

        Raises: RequestError, naming the field; CapacityError for what can never fit.
        """
        naive.check(self.model, request.ids, request.max_tokens)
        if request.stop and self.tokenizer is None:
            raise RequestError("stop: needs an engine with a tokenizer; got none; cut the ids yourself")
        self.memory.check_fits(len(request.ids) + request.max_tokens - 1)
        sequences = [self._sequence(request, index) for index in range(request.n)]
        self.queue += sequences
        return tuple(sequence.answer for sequence in sequences)

    def _sequence(self, request: Request, index: int) -> Sequence:
        self.counts.requests += 1
        ids, generated = ([int(token) for token in tokens] for tokens in (request.ids, request.generated))
        sampling = replace(request.sampling, seed=request.sampling.seed + index)
        text = TextStream(self.tokenizer) if self.tokenizer is not None else None
        stop = StopStrings(request.stop)
        said = "".join(stop.push(text.push(token)) for token in generated) if text is not None else ""
        return Sequence(
            answer=Answer(request, index, list(generated), said),
            number=self.counts.requests,
            sampler=Sampler(
                sampling,
                prompt=ids,
                generated=generated,
                drawn_from=self._drawn_from if request.drawn_from is None else request.drawn_from,
                hook=request.hook,
            ),
            tokens=ids + generated,
            prompt=np.array(ids, dtype=np.int64),
            salt=request.cache_salt if request.reuse and self.config.reuse else None,
            text=text,
            stop=stop,
        )

    def stream(self, request: Request) -> Iterator[Update]:
        """Add a request, now, and step until its answers have ended, giving what each step did to them. Others go on
        meanwhile; to close the stream cancels its own."""
        answers, updates = self.add(request), deque[Update]()
        self._listeners |= dict.fromkeys(answers, updates)
        return self._stream(answers, updates)

    def _stream(self, answers: tuple[Answer, ...], updates: deque[Update]) -> Iterator[Update]:
        try:
            while updates or any(answer.finish is None for answer in answers):
                if updates:
                    yield updates.popleft()
                else:
                    self.step()
        finally:
            for answer in answers:
                del self._listeners[answer]
                self.cancel(answer)

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.running or self.queue:
            self.step()

    def cancel(self, answer: Answer) -> None:
        """End an answer now; what it has stands. One that has ended stays as it is."""
        for sequence in (*self.running, *self.queue):
            if sequence.answer is answer:
                self._told(self._ended(sequence, Finish.CANCELLED))

    def step(self) -> list[Update]:
        """Do one pass. Returns what it did to each answer."""
        self._notice_weights()
        updates = self._overdue() + self._admitted()
        if self.running:
            counts, _ = self._shares()
            self._read(counts)
            updates += self._drawn([sequence for sequence, count in zip(self.running, counts, strict=True) if count])
        return self._told(updates)

    def session(
        self, of: Answer | Sequence_[int], *, salt: str = "", extra: Mapping[str, Any] | None = None
    ) -> Session:
        """Hold what is known of an answer, as far as it has come, or of ids. salt: of ids. extra: plain values of your
        own, for its file."""
        if not isinstance(of, Answer):
            return self._sessions.held(of, salt=salt, extra=extra)
        for row, sequence in enumerate(self.running):
            if sequence.answer is of:
                self._keep(row, sequence, Kind.REPLY, awaited=True)
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

    def _notice_weights(self) -> None:
        """Where weights have changed, what was read by the old ones is forgotten, and who runs begins again."""
        versions = fingerprint.versions(self.model)
        if versions == self._versions:
            return
        self._versions = versions
        self._retract()
        self.memory.forget()
        self._sessions = Sessions(self.memory, self.model, self.tokenizer)

    def _told(self, updates: list[Update]) -> list[Update]:
        for update in updates:
            if update.answer in self._listeners:
                self._listeners[update.answer].append(update)
        return updates

    def _overdue(self) -> list[Update]:
        """End those whose time is up."""
        now, updates = time.perf_counter(), list[Update]()
        for sequence in (*self.running, *self.queue):
            limit = sequence.answer.request.max_seconds
            if limit is not None and now - sequence.answer.added > limit:
                updates += self._ended(sequence, Finish.TIME)
        return updates

    def _admitted(self) -> list[Update]:
        """Who waits begins, in order, while there are rows, pages, and room in the pass."""
        updates: list[Update] = []
        for sequence in list(self.queue):
            row = len(self.running)
            if row == self.config.max_running:
                break
            match = self._match(sequence)
            _, room = self._shares()
            if not room and match.reused < len(sequence.tokens):
                break
            if self._about_to_be_read(sequence, match):
                continue
            audited = match.snapshot if self._audits.random() < self.config.audit_fraction else None
            begun = replace(match, snapshot=None) if audited is not None else match
            if not self.memory.begin(row, begun, sequence.longest):
                if row:
                    break
                error = (
                    "pages: too few are free, and nothing runs that would free more; close a session that holds them"
                )
                updates += self._ended(sequence, Finish.ERROR, error)
                continue
            self.queue.remove(sequence)
            self.running.append(sequence)
            self._count(sequence, match)
            self._plan(sequence, begun, audited)
            if begun.reused == len(sequence.tokens):
                updates += self._drawn([sequence])
        return updates

    def _shares(self) -> tuple[list[int], int]:
        positions = self.memory.state.positions[: len(self.running)]
        return (shares if self.exact else grid_shares)(self.running, positions, self.config.portion_tokens)

    def _match(self, sequence: Sequence) -> Match:
        """What can be reused of it."""
        if sequence.salt is None or self.memory.distrusted is not None:
            return Match(0, None, Cut.OFF)
        return self.memory.prefixes.match(sequence.keys, sequence.salt)

    def _about_to_be_read(self, sequence: Sequence, match: Match) -> bool:
        """Is somebody reading more of the same prompt than can be reused yet? Then this one waits, and a snapshot will
        lie where the two part."""
        if match.cut is Cut.OFF or not (self.exact and self.memory.sizes.snapshots):
            return False
        for position, other in zip(self.memory.state.positions, self.running, strict=False):
            if other.salt != sequence.salt or len(other.tokens) - position < 2:
                continue
            place = common(other.prompt, sequence.prompt)
            if place > position and place - match.reused >= WORTH_WAITING:
                other.pauses.setdefault(place, Kind.SHARED)
                other.awaited.add(place)
                return True
        return False

    def _count(self, sequence: Sequence, match: Match) -> None:
        """What became of its prompt, once: a sequence that was interrupted begins again."""
        if sequence.answer.reuse is not None:
            return
        length = len(sequence.tokens)
        sequence.answer.reuse = Reuse(length, match.matched, match.reused, match.cut)
        self.counts.prompt_tokens += length
        self.counts.matched_tokens += match.matched
        self.counts.reused_tokens += match.reused
        self.counts.lost_tokens[match.cut] += length - match.reused

    def _plan(self, sequence: Sequence, match: Match, audited: Snapshot | None) -> None:
        """Where its reading will pause."""
        if match.cut is Cut.OFF:
            return
        length, portion = len(sequence.tokens), self.config.portion_tokens
        if self.exact:
            boundaries = sequence.answer.request.boundaries
            sequence.pauses = self.memory.prefixes.stops(length, match, boundaries, portion)
        else:
            sequence.pauses = dict.fromkeys(range(match.reused + portion, length + 1, portion), Kind.TAIL)
        if match.snapshot is not None:
            sequence.logits = self.memory.logits[match.snapshot.slot]
        if audited is not None:
            audited.pins += 1
            sequence.audited = audited
            sequence.pauses[audited.node.end] = audited.kind
        else:
            self.memory.prefixes.use(match)

    def _read(self, counts: list[int]) -> None:
        """One pass, and the snapshots on its way. Where it is interrupted, everybody goes back to the queue."""
        memory = self.memory
        try:
            for row, count in enumerate(counts):
                memory.extend(row, count)
            read(self.model, memory.state, self.running, counts, calls(counts, alone=not self.exact))
        except BaseException:
            self._retract()
            raise
        self.counts.passes += 1
        self.counts.read_tokens += sum(counts)
        for row, sequence in enumerate(self.running):
            place = memory.state.positions[row]
            if counts[row] and place in sequence.pauses:
                self._keep(row, sequence, sequence.pauses.pop(place))

    def _keep(self, row: int, sequence: Sequence, kind: Kind, *, awaited: bool = False) -> None:
        """Offer a sequence's state, as it is now, for a snapshot."""
        memory, place, logits = self.memory, self.memory.state.positions[row], sequence.logits
        if logits is None or not torch.isfinite(logits).all():
            return
        if sequence.audited is not None and place == sequence.audited.node.end:
            self.counts.audits += 1
            memory.audit(row, sequence.audited, logits)
            sequence.audited.pins -= 1
            sequence.audited = None
        if sequence.salt is not None and memory.distrusted is None:
            awaited = awaited or place in sequence.awaited
            memory.keep(row, sequence.keys[:place], sequence.salt, kind, logits, awaited=awaited)

    def _drawn(self, sequences: list[Sequence]) -> list[Update]:
        """Those that have read all their tokens are given the next."""
        updates = []
        for sequence in sequences:
            if self.memory.state.positions[self.running.index(sequence)] == len(sequence.tokens):
                updates += self._draw(sequence)
        return updates

    def _draw(self, sequence: Sequence) -> list[Update]:
        answer, request, logits = sequence.answer, sequence.answer.request, sequence.logits
        assert logits is not None
        try:
            token = sequence.sampler.draw(logits)
        except RequestError as error:
            return self._ended(sequence, Finish.ERROR, str(error))
        if token in request.ends:
            return self._ended(sequence, Finish.END)
        sequence.tokens.append(token)
        answer.ids.append(token)
        answer.begun = answer.begun or time.perf_counter()
        chances = None if request.logprobs is None else logprobs(logits, token, request.logprobs)
        if chances is not None:
            answer.logprobs.append(chances)
        text = sequence.stop.push(sequence.text.push(token)) if sequence.text is not None else ""
        answer.text += text
        updates = [Update(answer, token, text, chances)]
        if sequence.stop.found is not None:
            updates += self._ended(sequence, Finish.STOP)
        elif len(answer.ids) == request.max_tokens:
            updates += self._ended(sequence, Finish.LENGTH)
        return updates

    def _ended(self, sequence: Sequence, finish: Finish, error: str | None = None) -> list[Update]:
        """A sequence leaves, from wherever it is; what it has read stays for reuse."""
        answer = sequence.answer
        if sequence in self.queue:
            self.queue.remove(sequence)
        else:
            self._leave(sequence, damaged=finish is Finish.ERROR)
        rest = ""
        if sequence.text is not None and finish is not Finish.STOP:
            rest = sequence.stop.push(sequence.text.finish()) + sequence.stop.finish()
        answer.text += rest
        answer.finish, answer.error, answer.ended = finish, error, time.perf_counter()
        return [Update(answer, None, rest)]

    def _leave(self, sequence: Sequence, *, damaged: bool) -> None:
        """Its row is free, and the last one's sequence takes it. damaged: its state must not be used again."""
        row, last = self.running.index(sequence), len(self.running) - 1
        if self.exact and not damaged:
            self._keep(row, sequence, Kind.REPLY)
        if sequence.audited is not None:
            sequence.audited.pins -= 1
        self.memory.end(row, last, damaged=damaged)
        self.running[row] = self.running[last]
        self.running.pop()

    def _retract(self) -> None:
        """A pass was interrupted, and rows are half-written: everybody begins again, where snapshots allow."""
        for row in reversed(range(len(self.running))):
            sequence = self.running[row]
            self.memory.end(row, row)
            sequence.pauses, sequence.logits = {}, None
            sequence.awaited.clear()
            if sequence.audited is not None:
                sequence.audited.pins -= 1
                sequence.audited = None
            self.queue.appendleft(sequence)
        self.running.clear()
