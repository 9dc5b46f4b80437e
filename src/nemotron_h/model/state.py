"""All that a model remembers between calls, passed in: `logits = model(tokens, state)`.

Each Mamba layer keeps the recurrent state at a chunk boundary and the inputs since; each attention layer keeps keys and
values in pages of BLOCK tokens. State alone reads and writes this storage, in place. The storage may be its own, or
rows and pages of pools that somebody else hands out and takes back: a slice of a pool is a tensor like any other.

Invariant: a position holds the tokens before it; places of a chunk or page not yet written are zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from nemotron_h.config.model import AttentionConfig, MambaConfig, ModelConfig
from nemotron_h.errors import ShapeError
from nemotron_h.grid import BLOCK, CHUNK
from nemotron_h.ops.conv import keep_last
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.ssd import Past, keep_inputs


@dataclass(slots=True)
class MambaState:
    """What one Mamba layer remembers of b sequences. The recurrent state and B stand turned, as products read them."""

    conv: Tensor  # (b, kernel - 1, channels), model dtype, newest last
    boundary: Tensor  # (b, h, n, p), float32, at the beginning of the chunk at hand
    x: Tensor  # (b, CHUNK, h p), model dtype, inputs of the chunk at hand
    dt: Tensor  # (b, h, CHUNK), float32, after softplus
    B: Tensor  # (b, g, n, CHUNK), model dtype

    @classmethod
    def zeros(cls, config: MambaConfig, batch: int, dtype: torch.dtype, device: torch.device) -> Self:
        h, p, n, g = config.num_heads, config.head_dim, config.state_size, config.num_groups

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        return cls(
            conv=zeros(config.conv_kernel - 1, config.conv_channels),
            boundary=zeros(h, n, p, dtype=torch.float32),
            x=zeros(CHUNK, h * p),
            dt=zeros(h, CHUNK, dtype=torch.float32),
            B=zeros(g, n, CHUNK),
        )

    @property
    def past(self) -> Past:
        """What the scan reads of it."""
        return Past(self.boundary, self.x, self.B)

    def push(self, xbc: Tensor, convolved: Tensor, dt: Tensor, boundary: Tensor | None, segments: Segments) -> None:
        """Remember a call: xbc and convolved (rows, channels), the conv's inputs and outputs; dt (c, h, CHUNK) of its
        chunks; the state at the beginning of the chunk at hand, None where it has not moved."""
        keep_last(xbc, segments, self.conv)
        keep_inputs(convolved, segments, self.x, self.B)
        self.dt.copy_(dt if segments.num_chunks == len(segments) else dt[segments.chunk_runs.sum(1) - 1])
        if boundary is not None:
            self.boundary.copy_(boundary)


@dataclass(frozen=True, slots=True)
class Paging:
    """Where the sequences of a call have their keys and values, and where its new rows go: the same in every layer."""

    table: Tensor  # (s, blocks) int64, the pages of each sequence in order, 0 beyond its last
    pages: Tensor  # (tokens,) int64, the page of each new row
    places: Tensor  # (tokens,) int64, and its place there

    @classmethod
    def of(cls, tables: Sequence[Sequence[int]], segments: Segments) -> Self:
        widest = max(len(table) for table in tables)
        table = torch.tensor([[*table, *[0] * (widest - len(table))] for table in tables], dtype=torch.int64)
        positions = segments.positions(torch.device("cpu"))[: segments.tokens]
        owners = segments.owners[: segments.tokens]
        return cls(table, table[owners, positions // BLOCK], positions % BLOCK)

    @classmethod
    def alone(cls, segments: Segments) -> Self:
        """Of a call whose sequences begin in it and are not remembered: pages in the order of sequences."""
        tables, used = [], 0
        for length in segments.lengths:
            count = -(-length // BLOCK)
            tables.append(range(used, used + count))
            used += count
        return cls.of(tables, segments)


@dataclass(slots=True)
class AttentionState:
    """Keys and values of one attention layer, in pages that any sequence's table may point to."""

    keys: Tensor  # (pages, k, d, BLOCK), model dtype, turned: a query's product with a block reads it row by row
    values: Tensor  # (pages, k, BLOCK, d), model dtype

    @classmethod
    def zeros(cls, config: AttentionConfig, pages: int, dtype: torch.dtype, device: torch.device) -> Self:
        k, d = config.num_kv_heads, config.head_dim
        shapes = (pages, k, d, BLOCK), (pages, k, BLOCK, d)
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))

    def push(self, k: Tensor, v: Tensor, paging: Paging) -> None:
        """Write new rows k and v (rows, kv, d) to their pages."""
        pages, places = paging.pages.to(k.device), paging.places.to(k.device)
        self.keys[pages, :, :, places] = k[: len(pages)]
        self.values[pages, :, places] = v[: len(pages)]

    def grow(self, pages: int) -> None:
        """Append pages of zeros."""
        self.keys, self.values = (torch.cat((t, t.new_zeros(pages, *t.shape[1:]))) for t in (self.keys, self.values))


@dataclass(slots=True)
class State:
    """What a model remembers of b sequences: their positions, their page tables, and each layer's part."""

    positions: list[int]
    tables: list[list[int]]  # of each sequence: the pages of its blocks, in order, the same in every attention layer
    layers: list[MambaState | AttentionState | None]
    own_pages: bool = False  # else somebody hands them out, through the tables
    moving: bool = False  # a call is writing to it, or was interrupted while it did

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Self:
        """A state before the first token, with storage of its own. dtype: the model's."""
        device = torch.device(device)
        layers: list[MambaState | AttentionState | None] = []
        for layer in config.layers:
            match layer:
                case MambaConfig():
                    layers.append(MambaState.zeros(layer, batch, dtype, device))
                case AttentionConfig():
                    layers.append(AttentionState.zeros(layer, 0, dtype, device))
                case _:
                    layers.append(None)
        return cls([0] * batch, [[] for _ in range(batch)], layers, own_pages=True)

    def __len__(self) -> int:
        return len(self.positions)

    def segments(self, lengths: Sequence[int]) -> Segments:
        """The segments of a call that gives each sequence that many new tokens, with pages for all of them."""
        if len(lengths) != len(self):
            raise ShapeError(
                f"tokens: must hold one row for each sequence of the state; got {len(lengths)}, {len(self)}"
            )
        for position, table, length in zip(self.positions, self.tables, lengths, strict=True):
            table.extend(self._pages(-(-(position + length) // BLOCK) - len(table)))
        return Segments(tuple(self.positions), tuple(lengths))

    def _pages(self, count: int) -> list[int]:
        """Numbers of fresh pages; the storage grows by a quarter at least, so that a long sequence rarely copies it."""
        pools = [layer for layer in self.layers if isinstance(layer, AttentionState)]
        if count < 1 or not pools:
            return [0] * max(count, 0)
        if not self.own_pages:
            raise ShapeError(f"tables: must have pages for the new tokens; {count} are missing; hand them out first")
        used = sum(len(table) for table in self.tables)
        if used + count > len(pools[0].keys):
            for pool in pools:
                pool.grow(max(used + count - len(pool.keys), len(pool.keys) // 4))
        return list(range(used, used + count))

    def enter(self) -> None:
        """A call begins to write. Raises: ShapeError where an earlier one was interrupted while it did."""
        if self.moving:
            raise ShapeError("state: was left half-written by a call that was interrupted; go on from a copy or anew")
        self.moving = True

    def advance(self, segments: Segments) -> None:
        """The call is done: its tokens are part of the past."""
        self.moving = False
        self.positions = [start + length for start, length in zip(segments.starts, segments.lengths, strict=True)]

    def select(self, indices: Sequence[int]) -> "State":
        """A copy, with storage of its own, of these sequences in this order; one may come several times."""
        rows = torch.tensor(list(indices), dtype=torch.int64)
        used = [page for index in indices for page in self.tables[index]]
        tables, first = [], 0
        for index in indices:
            tables.append(list(range(first, first + len(self.tables[index]))))
            first += len(self.tables[index])
        layers = [_picked(layer, rows, torch.tensor(used, dtype=torch.int64)) for layer in self.layers]
        positions = [self.positions[index] for index in indices]
        return State(positions, tables, layers, own_pages=True, moving=self.moving)

    def copy(self) -> "State":
        return self.select(range(len(self)))

    @property
    def size_bytes(self) -> int:
        """Of all tensors it points to."""
        parts = [layer for layer in self.layers if layer is not None]
        return sum(getattr(part, field.name).nbytes for part in parts for field in fields(part))


def _picked(
    layer: MambaState | AttentionState | None, rows: Tensor, pages: Tensor
) -> MambaState | AttentionState | None:
    if layer is None:
        return None
    index = rows if isinstance(layer, MambaState) else pages
    return type(layer)(*(getattr(layer, field.name)[index] for field in fields(layer)))
