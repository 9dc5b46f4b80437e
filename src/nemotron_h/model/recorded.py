"""Calls of a few rows a sequence, recorded as they are first made and run again from then on.

    logits = calls(tokens, segments, rows)

A step of generation launches hundreds of kernels, and to do it from Python takes longer than they do. But one step is
like the last: the same launches of the same memory. What differs are tokens, and where sequences stand; from that the
first launch makes the tables that the others read, whose shapes follow from how many sequences and rows there are
(`segments.few`). So the call is made once as any other, and its launches are recorded (`jit/kernels.py`); the next ones
write what differs over its own and run the launches again. They are the same kernels on the same numbers, hence the
same bits. Rows of padding are whatever an earlier call left there, which no other row reads.

A call in which torch computes anything cannot be run again: it is found out, and made anew each time.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemotron_h.grid import round_up
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.state import Paging, State
from nemotron_h.ops.jit.compiler import runs
from nemotron_h.ops.jit.kernels import Recording, recording
from nemotron_h.ops.jit.tables import tables_of_few
from nemotron_h.ops.segments import Segments

MOST_ROWS = 64  # of the calls that are kept: each holds what its layers compute of every row
BLOCKS = 16  # pages that a sequence's table grows by

Key = tuple[range, int, int]  # sequences, rows, pages that the tables have room for


@dataclass(frozen=True)
class Call:
    """A recorded call: its launches, what they read that differs, arrays of numpy, and where its logits are."""

    launches: Recording
    ids: Any  # (rows,) int64
    starts: Any  # (segments,) int64
    lengths: Any
    table: Any  # (segments, blocks) int64
    logits: Tensor

    def again(self, tokens: Sequence[int], segments: Segments, tables: Sequence[Sequence[int]]) -> Tensor:
        """Logits (rows, vocab) float32."""
        self.ids[: len(tokens)] = tokens
        self.starts[:], self.lengths[:] = segments.starts, segments.lengths
        for own, pages in zip(self.table, tables, strict=True):
            own[: len(pages)] = pages
        self.launches.replay()
        return self.logits.float() if self.logits.dtype != torch.float32 else self.logits.clone()


class Calls:
    """Of a model, and of one state's storage, which may not be replaced. `forget` when weights have changed.

    recorded: whether any are; where bits depend on how a call is made, none may be.
    """

    def __init__(self, model: Hybrid, state: State, *, recorded: bool = True) -> None:
        self.model, self.state = model, state
        self.recorded = recorded and runs(model.backbone.embeddings.weight)
        self.new = False  # was the last call of a size that was not known? Such a one takes longer
        self._calls: OrderedDict[Key, Call | None] = OrderedDict()  # None: cannot be run again

    def forget(self) -> None:
        self._calls.clear()

    def __call__(self, tokens: Sequence[int], segments: Segments, rows: range) -> Tensor | None:
        """Logits (segments.rows, vocab) float32 of neighbouring sequences of the state, which moves on; tokens:
        segments.tokens of them. None where the call cannot be recorded, and nothing was done."""
        self.new = False
        if not (self.recorded and segments.few):
            return None
        tables = self.state.tables[rows.start : rows.stop]
        blocks = round_up(max(len(table) for table in tables), BLOCKS)
        key = rows, segments.rows, blocks
        if key not in self._calls:
            self.new = True
            return self._recorded(key, tokens, segments, Paging.of(tables, segments, blocks), rows)
        call = self._calls[key]
        if call is None:
            return None
        self._calls.move_to_end(key)
        logits = call.again(tokens, segments, tables)
        ends = [start + length for start, length in zip(segments.starts, segments.lengths, strict=True)]
        self.state.positions[rows.start : rows.stop] = ends
        return logits

    def _recorded(self, key: Key, tokens: Sequence[int], segments: Segments, paging: Paging, rows: range) -> Tensor:
        ids = np.zeros(segments.rows, np.int64)
        ids[: len(tokens)] = tokens
        part = self.state.part(rows)
        part.enter()
        with recording() as launches:
            tables_of_few(1, *segments.tables, *paging.tables)
            hidden = self.model.through(torch.from_numpy(ids), segments, part, paging)
            logits = self.model.head(hidden)
        part.advance(segments)
        self.state.follow(part, rows)
        starts, _, lengths = segments.spans
        made = Call(launches, ids, starts, lengths, paging.table.numpy(), logits)
        self._calls[key] = None if launches.spoiled else made
        while len(self._calls) > 1 and sum(count for _, count, _ in self._calls) > MOST_ROWS:
            self._calls.popitem(last=False)
        return logits.float().clone()
