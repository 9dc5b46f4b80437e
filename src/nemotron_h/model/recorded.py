"""Calls of a few rows a sequence, recorded as they are first made and run again from then on.

    logits = calls(tokens, segments, rows)

A step of generation launches hundreds of kernels, and to do it from Python takes longer than they do. But one step is
like the last: the same launches of the same memory. What differs, tokens and where sequences stand, are tables, whose
shapes follow from how many sequences and rows there are (`segments.few`). So the call is made once as any other, and
its launches are recorded (`jit/kernels.py`); the next ones write their tables over its own and run the launches again.
They are the same kernels on the same numbers, hence the same bits. Rows of padding are whatever an earlier call left
there, which no other row reads.

A call in which torch computes anything cannot be run again: it is found out, and made anew each time.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.grid import round_up
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.state import Paging, State
from nemotron_h.ops.jit.kernels import Recording, recording
from nemotron_h.ops.segments import Segments

MOST_ROWS = 64  # of the calls that are kept: each holds what its layers compute of every row
BLOCKS = 16  # pages that a sequence's table grows by

Key = tuple[range, int, int]  # sequences, rows, pages that the tables have room for


@dataclass(frozen=True)
class Call:
    """A recorded call: its launches, what they read of a call, and where its logits are."""

    launches: Recording
    ids: Tensor
    segments: Segments
    paging: Paging
    logits: Tensor


class Calls:
    """Of a model, and of one state's storage, which may not be replaced. `forget` when weights have changed.

    recorded: whether any are; where bits depend on how a call is made, none may be.
    """

    def __init__(self, model: Hybrid, state: State, *, recorded: bool = True) -> None:
        self.model, self.state, self.recorded = model, state, recorded
        self.new = False  # was the last call of a size that was not known? Such a one takes longer
        self._calls: OrderedDict[Key, Call | None] = OrderedDict()  # None: cannot be run again

    def forget(self) -> None:
        self._calls.clear()

    def __call__(self, tokens: Tensor, segments: Segments, rows: range) -> Tensor | None:
        """Logits (segments.rows, vocab) float32 of neighbouring sequences of the state, which moves on; tokens
        (segments.tokens,) int64. None where the call cannot be recorded, and nothing was done."""
        self.new = False
        if not (self.recorded and segments.few):
            return None
        tables = self.state.tables[rows.start : rows.stop]
        blocks = round_up(max(len(table) for table in tables), BLOCKS)
        key = rows, segments.rows, blocks
        ids = F.pad(tokens, (0, segments.rows - segments.tokens))
        paging = Paging.of(tables, segments, blocks)
        if key not in self._calls:
            self.new = True
            return self._recorded(key, ids, segments, paging, rows)
        call = self._calls[key]
        if call is None:
            return None
        self._calls.move_to_end(key)
        call.ids.copy_(ids)
        pairs = zip((*call.segments.tables, *call.paging.tables), (*segments.tables, *paging.tables), strict=True)
        for own, given in pairs:
            own[...] = given
        call.launches.replay()
        ends = [start + length for start, length in zip(segments.starts, segments.lengths, strict=True)]
        self.state.positions[rows.start : rows.stop] = ends
        return call.logits.float() if call.logits.dtype != torch.float32 else call.logits.clone()

    def _recorded(self, key: Key, ids: Tensor, segments: Segments, paging: Paging, rows: range) -> Tensor:
        part = self.state.part(rows)
        part.enter()
        with recording() as launches:
            hidden = self.model.through(ids, segments, part, paging)
            logits = self.model.head(hidden)
        part.advance(segments)
        self.state.follow(part, rows)
        self._calls[key] = None if launches.spoiled else Call(launches, ids, segments, paging, logits)
        while len(self._calls) > 1 and sum(count for _, count, _ in self._calls) > MOST_ROWS:
            self._calls.popitem(last=False)
        return logits.float().clone()
