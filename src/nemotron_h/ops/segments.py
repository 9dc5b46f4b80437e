"""Which rows of a call belong to which sequence, and where each run begins on that sequence's own grid.

A call computes on flat tensors (rows, channels): the new tokens of all sequences or documents, one run (segment) after
the other, padded at the end to a multiple of ROWS. Linear layers, norms and activations need to know nothing more.
The mixers look along a sequence: this file tells them which rows those are.

Packed documents, a batch of prompts, one decode step of many sequences and a portion of a long prompt are all just
segments, so packed equals alone and cut equals whole by construction.

    carried   inputs of the chunk at hand that earlier calls brought (1 to CHUNK once a sequence has begun)
    chunks    runs of CHUNK places: each segment's carried inputs, then its new rows, then zeros
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.grid import CHUNK, ROWS, round_up


@dataclass(frozen=True)
class Segments:
    """starts[s]: tokens that segment s's sequence has seen before; lengths[s]: its rows in this call."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.lengths) or not self.lengths:
            raise ShapeError(
                f"segments: must have a start for each length; got {len(self.starts)}, {len(self.lengths)}"
            )
        if min(self.lengths) < 1 or min(self.starts) < 0:
            raise ShapeError(f"segments: must have lengths of 1 or more and starts of 0 or more; got {self}")

    @classmethod
    def of_batch(cls, batch: int, length: int, starts: Sequence[int] | None = None) -> Self:
        """One segment of that length for each row of a batch."""
        return cls(tuple(starts) if starts is not None else (0,) * batch, (length,) * batch)

    @classmethod
    def of_documents(cls, documents: Tensor) -> Self:
        """One segment for each document: documents (b, l) is constant along one and changes at its end."""
        batch, length = documents.shape
        changes = torch.ones(batch, length, dtype=torch.bool, device=documents.device)
        changes[:, 1:] = documents[:, 1:] != documents[:, :-1]
        begins = changes.flatten().nonzero().flatten().tolist()
        lengths = tuple(after - begin for begin, after in zip(begins, [*begins[1:], batch * length], strict=True))
        return cls((0,) * len(lengths), lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def tokens(self) -> int:
        """Rows that are tokens; the rest up to `rows` is padding."""
        return sum(self.lengths)

    @cached_property
    def rows(self) -> int:
        return round_up(self.tokens, ROWS)

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """The first row of each segment."""
        sums = [0]
        for length in self.lengths[:-1]:
            sums.append(sums[-1] + length)
        return tuple(sums)

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
    def chunk_begins(self) -> tuple[int, ...]:
        """The first chunk of each segment, in the order of segments."""
        sums = [0]
        for count in self.chunks[:-1]:
            sums.append(sums[-1] + count)
        return tuple(sums)

    @cached_property
    def num_chunks(self) -> int:
        return sum(self.chunks)

    @cached_property
    def even(self) -> bool:
        """Do all segments begin at 0 and fill the same number of whole chunks? Then chunks are a view of the rows."""
        return not any(self.starts) and len(set(self.lengths)) == 1 and self.lengths[0] % CHUNK == 0

    @cached_property
    def places(self) -> Tensor:
        """(tokens,) int64: where each row stands among num_chunks * CHUNK places."""
        return torch.cat(
            [
                torch.arange(first * CHUNK + carried, first * CHUNK + carried + length)
                for first, carried, length in zip(self.chunk_begins, self.carried, self.lengths, strict=True)
            ]
        )

    @cached_property
    def query_counts(self) -> Tensor:
        """(num_chunks,) int64: new rows of each chunk."""
        return torch.bincount(self.places // CHUNK, minlength=self.num_chunks)

    @cached_property
    def queries(self) -> int:
        """Places of a chunk for which outputs are computed: CHUNK, or fewer when no chunk has more new rows."""
        return min(CHUNK, round_up(int(self.query_counts.max()), ROWS))

    @cached_property
    def query_begins(self) -> Tensor:
        """(num_chunks,) int64: the place of each chunk's first query."""
        return self.new_begins if self.queries < CHUNK else torch.zeros_like(self.new_begins)

    @cached_property
    def new_begins(self) -> Tensor:
        """(num_chunks,) int64: the place of each chunk's first new row."""
        begins = torch.zeros(self.num_chunks, dtype=torch.int64)
        begins[torch.tensor(self.chunk_begins)] = torch.tensor(self.carried).clamp(max=CHUNK - 1)
        return begins

    @cached_property
    def query_places(self) -> Tensor:
        """(num_chunks, queries) int64: the place in its chunk of each query. Spare queries repeat the last place."""
        return (self.query_begins[:, None] + torch.arange(self.queries)).clamp(max=CHUNK - 1)

    @cached_property
    def query_of_row(self) -> Tensor:
        """(tokens,) int64: where each row stands among num_chunks * queries."""
        chunk, place = self.places // CHUNK, self.places % CHUNK
        return chunk * self.queries + place - self.query_begins[chunk]

    @cached_property
    def owners(self) -> Tensor:
        """(rows,) int64: each row's segment; 0 for padding."""
        owners = torch.zeros(self.rows, dtype=torch.int64)
        owners[: self.tokens] = torch.arange(len(self)).repeat_interleave(torch.tensor(self.lengths))
        return owners

    @cached_property
    def offsets(self) -> Tensor:
        """(rows,) int64: each row's place in its segment; -1 for padding."""
        offsets = torch.full((self.rows,), -1, dtype=torch.int64)
        offsets[: self.tokens] = torch.arange(self.tokens) - torch.tensor(self.begins)[self.owners[: self.tokens]]
        return offsets

    def positions(self, device: torch.device) -> Tensor:
        """(rows,) int64: each row's place in its sequence; 0 for padding."""
        positions = torch.zeros(self.rows, dtype=torch.int64)
        for start, begin, length in zip(self.starts, self.begins, self.lengths, strict=True):
            positions[begin : begin + length] = torch.arange(start, start + length)
        return positions.to(device)

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

    def spread_queries(self, values: Tensor) -> Tensor:
        """Rows (rows, ...) to (num_chunks, queries, ...), zeros for spare queries."""
        shape = (self.num_chunks, self.queries, *values.shape[1:])
        if self.even:
            return values.view(shape)
        flat = values.new_zeros(self.num_chunks * self.queries, *values.shape[1:])
        return flat.index_copy(0, self.query_of_row.to(values.device), values[: self.tokens]).view(shape)

    def collect_queries(self, values: Tensor) -> Tensor:
        """(num_chunks, queries, ...) back to rows (rows, ...), zeros for padding."""
        flat = values.reshape(self.num_chunks * self.queries, *values.shape[2:])
        if self.even:
            return flat
        picked = flat.index_select(0, self.query_of_row.to(values.device))
        return torch.cat((picked, picked.new_zeros(self.rows - self.tokens, *picked.shape[1:])))
