"""An answer in progress: its tokens, how far its reading goes in one stretch, its draws and its text."""

import time
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Self

import numpy as np
from torch import Tensor

from nemotron_h.grid import CHUNK
from nemotron_h.inference.drafts import Lookup
from nemotron_h.inference.prefix import Keys, Kind, Snapshot
from nemotron_h.inference.request import Answer, Finish, Request
from nemotron_h.inference.sampling import Logprobs, Sampler
from nemotron_h.text.spans import mark_ids
from nemotron_h.text.stream import StopStrings, TextStream
from nemotron_h.text.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class Sequence:
    """Its row, and how many tokens have been read, are the state's."""

    answer: Answer
    number: int  # in the order of arrival
    sampler: Sampler
    tokens: list[int]  # the prompt, and what was drawn
    prompt: Keys
    salt: str | None  # of the tree that it reuses and feeds; None: neither
    tokenizer: Tokenizer | None
    text: TextStream | None = field(init=False)  # None: there is no tokenizer
    stop: StopStrings = field(init=False)
    pauses: dict[int, Kind] = field(default_factory=dict)  # places where reading stops, for a snapshot
    awaited: set[int] = field(default_factory=set)  # those where another request will begin
    logits: Tensor | None = None  # (vocab,), after the last token that was read, where they were wanted
    ahead: list[tuple[int, Tensor]] = field(default_factory=list)  # a draft: tokens read beyond, the logits after each
    lookup: Lookup = field(default_factory=Lookup)  # what drafts come from
    audited: Snapshot | None = None  # read cold, to be compared with this

    @classmethod
    def of(
        cls,
        request: Request,
        index: int,
        *,
        number: int,
        salt: str | None,
        tokenizer: Tokenizer | None,
        drawn_from: Tensor | None,
    ) -> Self:
        """The request's completion of that index. drawn_from: where the request does not say."""
        ids, generated = ([int(token) for token in tokens] for tokens in (request.ids, request.generated))
        sampler = Sampler(
            replace(request.sampling, seed=request.sampling.seed + index),
            prompt=ids,
            generated=generated,
            drawn_from=drawn_from if request.drawn_from is None else request.drawn_from,
            hook=request.hook,
        )
        return cls(
            answer=Answer(request, index, generated),
            number=number,
            sampler=sampler,
            tokens=ids + generated,
            prompt=np.array(ids, dtype=np.int64),
            salt=salt,
            tokenizer=tokenizer,
        )

    def __post_init__(self) -> None:
        self._decode()

    def _decode(self) -> None:
        """The text of the answer's ids, from the first on."""
        request, tokenizer = self.answer.request, self.tokenizer
        self.text, self.stop = None, StopStrings(request.stop)
        if tokenizer is not None:
            self.text = TextStream(tokenizer, visible=mark_ids(tokenizer) if request.marks_visible else ())
        texts = [self._text_of(token) for token in self.answer.ids]
        self.answer.text, self.answer.certain = "".join(texts), list(accumulate(map(len, texts)))

    def _text_of(self, token: int) -> str:
        """What is certain with one more token."""
        return self.stop.push(self.text.push(token)) if self.text is not None else ""

    @property
    def keys(self) -> Keys:
        """Of its tokens."""
        return self.prompt if len(self.tokens) == len(self.prompt) else np.array(self.tokens, dtype=np.int64)

    @property
    def alone(self) -> bool:
        """Does nobody but the request's own completions reuse what it reads?"""
        return not self.answer.request.reuse

    @property
    def longest(self) -> int:
        """Tokens that it will have read at most: the last one drawn is not read."""
        return len(self.prompt) + self.answer.request.max_tokens - 1

    def room_ahead(self, position: int) -> int:
        """Tokens that a draft may have after the next one to be read: it ends where the answer does, and at the chunk's
        end, where the state moves on."""
        return max(0, min(self.longest - position - 1, CHUNK - 1 - position % CHUNK))

    def left(self, position: int) -> int:
        """Tokens to read before the next is drawn, or before a pause."""
        return min([len(self.tokens), *(place for place in self.pauses if place > position)]) - position

    def take(self, token: int, chances: Logprobs | None) -> None:
        """The next token. It is the answer's when all else of it is."""
        answer = self.answer
        answer.text += self._text_of(token)
        answer.certain.append(len(answer.text))
        if chances is not None:
            answer.logprobs.append(chances)
        self.tokens.append(token)
        answer.ids.append(token)

    @property
    def finish(self) -> Finish | None:
        """Why no more tokens are to be drawn, where none are."""
        if self.stop.found is not None:
            return Finish.STOP
        return Finish.LENGTH if len(self.answer.ids) >= self.answer.request.max_tokens else None

    def end(self, finish: Finish, error: str | None) -> None:
        """No token comes any more: the text that was held back. It has ended when all else is there."""
        answer = self.answer
        if self.text is not None:
            answer.text += self.stop.push(self.text.finish()) + self.stop.finish()
        answer.error, answer.ended = error, time.perf_counter()
        answer.finish = finish

    def begin_again(self) -> None:
        """What was planned for its reading is planned anew; a token that is not one of the answer's yet is drawn again,
        though it was half taken."""
        answer = self.answer
        drawn = len(answer.ids) - len(answer.request.generated)
        self.tokens = [*self.prompt.tolist(), *answer.ids]
        del answer.logprobs[drawn:]
        self._decode()
        self.pauses, self.logits, self.ahead, self.lookup = {}, None, [], Lookup()
        self.awaited.clear()
        self.let_go()
        self.sampler.rewind(self.answer.ids)

    def let_go(self) -> None:
        """It holds no snapshot any more."""
        if self.audited is not None:
            self.audited.pins -= 1
            self.audited = None
