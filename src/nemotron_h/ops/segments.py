"""Which rows of a call belong to which sequence, and where each run begins on that sequence's own grid.

A call computes on flat tensors (rows, channels): the new tokens of all sequences or documents, one run (segment) after
the other, padded at the end to a multiple of rows that this machine's products need. Linear layers, norms and
activations need to know nothing more. The mixers look along a sequence: this file tells them which rows those are.

Packed documents, a batch of prompts, one decode step of many sequences and a portion of a long prompt are all just
segments, so packed equals alone and cut equals whole by construction.

    carried   inputs of the chunk at hand that earlier calls brought (1 to CHUNK once a sequence has begun)
    chunks    runs of CHUNK places: each segment's carried inputs, then its new rows, then zeros
    room      chunks that a segment has places for: where all go on with a few rows, two each, so that the shapes of
              such a call follow from its lengths alone
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.grid import AHEAD, CHUNK, PIECE, ROWS, round_up

FEW = 1 + AHEAD  # rows of a segment that are a few


@dataclass(frozen=True)
class Segments:
    """starts[s]: tokens that segment s's sequence has seen before; lengths[s]: its rows in this call."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    multiple: int = ROWS  # of the call's rows; it divides CHUNK, so that whole chunks need no padding

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.lengths) or not self.lengths:
            raise ShapeError(
                f"segments: must have a start for each length; got {len(self.starts)}, {len(self.lengths)}"
            )
        if min(self.lengths) < 1 or min(self.starts) < 0:
            raise ShapeError(f"segments: must have lengths of 1 or more and starts of 0 or more; got {self}")
        if self.multiple < 1 or CHUNK % self.multiple:
            raise ShapeError(f"multiple: must divide {CHUNK}; got {self.multiple}")

    @classmethod
    def of_batch(cls, batch: int, length: int, starts: Sequence[int] | None = None, *, multiple: int = ROWS) -> Self:
        """One segment of that length for each row of a batch."""
        return cls(tuple(starts) if starts is not None else (0,) * batch, (length,) * batch, multiple)

    @classmethod
    def of_documents(cls, documents: Tensor, *, multiple: int = ROWS) -> Self:
        """One segment for each document: documents (b, l) is constant along one and changes at its end."""
        batch, length = documents.shape
        changes = torch.ones(batch, length, dtype=torch.bool, device=documents.device)
        changes[:, 1:] = documents[:, 1:] != documents[:, :-1]
        begins = changes.flatten().nonzero().flatten().tolist()
        lengths = tuple(after - begin for begin, after in zip(begins, [*begins[1:], batch * length], strict=True))
        return cls((0,) * len(lengths), lengths, multiple)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def tokens(self) -> int:
        """Rows that are tokens; the rest up to `rows` is padding."""
        return sum(self.lengths)

    @cached_property
    def rows(self) -> int:
        return round_up(self.tokens, self.multiple)

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """The first row of each segment."""
        sums = [0]
        for length in self.lengths[:-1]:
            sums.append(sums[-1] + length)
        return tuple(sums)

    @cached_property
    def spans(self) -> tuple[Any, Any, Any]:
        """As int64 arrays of numpy: of each segment its first place in its sequence, its first row, and how many."""
        return np.array(self.starts), np.array(self.begins), np.array(self.lengths)

    @cached_property
    def last_rows(self) -> tuple[int, ...]:
        """The row of each segment's last token."""
        return tuple(begin + length - 1 for begin, length in zip(self.begins, self.lengths, strict=True))

    @cached_property
    def carried(self) -> tuple[int, ...]:
        """Inputs of the chunk at hand from earlier calls; a chunk just filled is at hand until the next begins."""
        return tuple((start - 1) % CHUNK + 1 if start else 0 for start in self.starts)

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """Chunks each segment touches."""
        return tuple(
            -(-(carried + length) // CHUNK) for carried, length in zip(self.carried, self.lengths, strict=True)
        )

    @cached_property
    def few(self) -> bool:
        """Do all segments go on with a few rows?"""
        return max(self.lengths) <= FEW and min(self.starts) > 0

    @cached_property
    def room(self) -> tuple[int, ...]:
        """Chunks that each segment has places for."""
        return (2,) * len(self) if self.few else self.chunks

    @cached_property
    def chunk_begins(self) -> tuple[int, ...]:
        """The first chunk of each segment, in the order of segments."""
        sums = [0]
        for count in self.room[:-1]:
            sums.append(sums[-1] + count)
        return tuple(sums)

    @cached_property
    def num_chunks(self) -> int:
        """In all, those without a row too."""
        return sum(self.room)

    @cached_property
    def even(self) -> bool:
        """Do all segments begin at 0 and fill the same number of whole chunks? Then chunks are a view of the rows."""
        return not any(self.starts) and len(set(self.lengths)) == 1 and self.lengths[0] % CHUNK == 0

    @cached_property
    def places(self) -> Tensor:
        """(tokens,) int64: where each row stands among num_chunks * CHUNK places."""
        runs = zip(self.chunk_begins, self.carried, self.lengths, strict=True)
        return torch.from_numpy(
            np.concatenate([np.arange(length) + (first * CHUNK + held) for first, held, length in runs])
        )

    @cached_property
    def grid(self) -> tuple[Any, Any, Any, Any]:
        """Of each chunk, as int64 arrays of numpy: its segment, -1 where it has no place in use, the place of its first
        new row, how many new rows it has, and the first of them in the call."""
        if self.few:
            return self._grid_of_few
        begins = np.zeros(self.num_chunks, dtype=np.int64)
        begins[list(self.chunk_begins)] = self.carried
        counts = np.bincount(self.places.numpy() // CHUNK, minlength=self.num_chunks)
        return np.arange(len(self)).repeat(self.room), begins, counts, counts.cumsum() - counts

    @property
    def _grid_of_few(self) -> tuple[Any, Any, Any, Any]:
        """The same of two chunks each: before each token there is no time for more."""
        owners, begins, counts = np.zeros((3, 2 * len(self)), dtype=np.int64)
        lengths, carried = np.array(self.lengths), (np.array(self.starts) - 1) % CHUNK + 1
        own = np.arange(len(self))
        begins[::2], counts[::2] = carried, np.minimum(lengths, CHUNK - carried)
        counts[1::2] = lengths - counts[::2]
        owners[::2], owners[1::2] = own, np.where(counts[1::2] > 0, own, -1)
        return owners, begins, counts, counts.cumsum() - counts

    @cached_property
    def chunk_runs(self) -> Any:
        """(segments, 2) int64, an array of numpy: each segment's first chunk, and how many."""
        return np.array((self.chunk_begins, self.chunks)).T.copy()

    @cached_property
    def owners(self) -> Tensor:
        """(rows,) int64: each row's segment; 0 for padding."""
        owners = np.zeros(self.rows, dtype=np.int64)
        owners[: self.tokens] = np.arange(len(self)).repeat(self.lengths)
        return torch.from_numpy(owners)

    @cached_property
    def offsets(self) -> Tensor:
        """(rows,) int64: each row's place in its segment; -1 for padding."""
        offsets = np.full(self.rows, -1, dtype=np.int64)
        offsets[: self.tokens] = np.arange(self.tokens) - np.array(self.begins).repeat(self.lengths)
        return torch.from_numpy(offsets)

    def positions(self, device: torch.device) -> Tensor:
        """(rows,) int64: each row's place in its sequence; 0 for padding."""
        positions = self.offsets.clamp(min=0) + torch.tensor(self.starts)[self.owners]
        positions[self.tokens :] = 0
        return positions.to(device)

    @cached_property
    def pieces(self) -> tuple[Any, Any, Any, Any]:
        """Runs of rows between multiples of PIECE of their sequence, as int64 arrays of numpy: each one's segment,
        first row, length, and the place of its first row in the sequence. Of few rows always two, one may be empty.
        """
        found = []
        for index, (start, begin, length) in enumerate(zip(self.starts, self.begins, self.lengths, strict=True)):
            edges = [start, *range(round_up(start + 1, PIECE), start + length, PIECE), start + length]
            found += [(index, begin + a - start, b - a, a) for a, b in pairwise(edges)]
            if self.few and len(edges) == 2:
                found.append((index, begin, 0, start))
        return tuple(np.array(column) for column in zip(*found, strict=True))  # type: ignore[return-value]

    @property
    def tables(self) -> tuple[Any, ...]:
        """All arrays that kernels read of a call, numpy's; of a call of a few rows their shapes follow from how many
        segments and rows it has."""
        own = self.owners.numpy(), self.offsets.numpy()
        return (*self.grid, self.chunk_runs, *own, *self.pieces, *self.spans)

    def taps(self, kernel: int) -> Tensor:
        """(kernel, rows) int64: which rows of [carried (segments * (kernel - 1)) | rows] each conv output reads."""
        reach = kernel - 1
        padding = len(self) * reach
        taps = torch.zeros(kernel, self.rows, dtype=torch.int64)
        for index, (begin, length) in enumerate(zip(self.begins, self.lengths, strict=True)):
            window = torch.cat(
                (
                    torch.arange(index * reach, (index + 1) * reach),
                    torch.arange(padding + begin, padding + begin + length),
                )
            )
            for tap in range(kernel):
                taps[tap, begin : begin + length] = window[tap : tap + length]
        return taps

    def spread(self, values: Tensor) -> Tensor:
        """Rows (rows, ...) to chunks (num_chunks, CHUNK, ...), zeros where no new row stands."""
        shape = (self.num_chunks, CHUNK, *values.shape[1:])
        if self.even:
            return values.view(shape)
        flat = values.new_zeros(self.num_chunks * CHUNK, *values.shape[1:])
        return flat.index_copy(0, self.places.to(values.device), values[: self.tokens]).view(shape)

    def collect(self, values: Tensor) -> Tensor:
        """Chunks (num_chunks, CHUNK, ...) back to rows (rows, ...), zeros for padding."""
        flat = values.reshape(self.num_chunks * CHUNK, *values.shape[2:])
        if self.even:
            return flat
        picked = flat.index_select(0, self.places.to(values.device))
        return torch.cat((picked, picked.new_zeros(self.rows - self.tokens, *picked.shape[1:])))

    def after_kept(self, chunks: Tensor, kept: Tensor | None, dim: int) -> Tensor:
        """Chunks with what each segment's chunk at hand already held put before its new places.

        chunks (num_chunks, ...), kept (segments, ...), places along dim in both; None: nothing was held.
        """
        if kept is None:
            return chunks
        chunks = chunks.clone()
        for first, held, own in zip(self.chunk_begins, self.carried, kept, strict=True):
            chunks[first].narrow(dim - 1, 0, held).copy_(own.narrow(dim - 1, 0, held))
        return chunks
