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
from nemotron_h.ops.attention import Blocks
from nemotron_h.ops.conv import last_inputs
from nemotron_h.ops.segments import Segments


@dataclass(slots=True)
class MambaState:
    """What one Mamba layer remembers of b sequences."""

    conv: Tensor  # (b, kernel - 1, channels), model dtype, newest last
    boundary: Tensor  # (b, h, p, n), float32, at the beginning of the chunk at hand
    x: Tensor  # (b, h, CHUNK, p), model dtype, inputs of the chunk at hand
    dt: Tensor  # (b, CHUNK, h), float32, after softplus
    B: Tensor  # (b, g, CHUNK, n), model dtype

    @classmethod
    def zeros(cls, config: MambaConfig, batch: int, dtype: torch.dtype, device: torch.device) -> Self:
        h, p, n, g = config.num_heads, config.head_dim, config.state_size, config.num_groups

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        return cls(
            conv=zeros(config.conv_kernel - 1, config.conv_channels),
            boundary=zeros(h, p, n, dtype=torch.float32),
            x=zeros(h, CHUNK, p),
            dt=zeros(CHUNK, h, dtype=torch.float32),
            B=zeros(g, CHUNK, n),
        )

    def push_conv(self, inputs: Tensor, segments: Segments) -> None:
        """Remember the newest conv inputs: inputs (rows, channels)."""
        self.conv.copy_(last_inputs(inputs, segments, self.conv))

    def push_inputs(self, x: Tensor, dt: Tensor, B: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """Write new rows x (rows, h, p), dt (rows, h), B (rows, g, n) to the chunk at hand.

        Returns: the chunks of the call, (c, h, CHUNK, p), (c, CHUNK, h), (c, g, CHUNK, n), carried inputs included.
        """
        if max(segments.chunks) == 1:  # nothing moves on: the chunks of the call are the chunks at hand
            device, tokens = x.device, segments.tokens
            owner, place = (segments.places // CHUNK).to(device), (segments.places % CHUNK).to(device)
            self.x[owner, :, place] = x[:tokens]
            self.dt[owner, place] = dt[:tokens]
            self.B[owner, :, place] = B[:tokens]
            return self.x, self.dt, self.B
        chunks = (
            segments.spread(x).transpose(1, 2).contiguous(),
            segments.spread(dt).contiguous(),
            segments.spread(B).transpose(1, 2).contiguous(),
        )
        for index, (first, count, carried) in enumerate(
            zip(segments.chunk_begins, segments.chunks, segments.carried, strict=True)
        ):
            for chunk, kept, places in zip(chunks, (self.x, self.dt, self.B), (1, 0, 1), strict=True):
                old, new = kept[index], chunk[first]
                new.narrow(places, 0, carried).copy_(old.narrow(places, 0, carried))
                old.copy_(chunk[first + count - 1])
        return chunks

    def move_on(self, boundary: Tensor | None) -> None:
        """Remember the state at the beginning of the chunk at hand; None: it has not moved."""
        if boundary is not None:
            self.boundary.copy_(boundary)


@dataclass(slots=True)
class AttentionState:
    """Keys and values of one attention layer, in pages that any sequence's table may point to."""

    keys: Tensor  # (pages, k, BLOCK, d), model dtype
    values: Tensor  # (pages, k, BLOCK, d), model dtype

    @classmethod
    def zeros(cls, config: AttentionConfig, pages: int, dtype: torch.dtype, device: torch.device) -> Self:
        shape = (pages, config.num_kv_heads, BLOCK, config.head_dim)
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))

    def push(self, k: Tensor, v: Tensor, segments: Segments, tables: Sequence[Sequence[int]]) -> list[Blocks]:
        """Write new rows k and v (rows, kv, d) to their pages. Returns each sequence's blocks, first to last."""
        positions = segments.positions(torch.device("cpu"))[: segments.tokens]
        owners = torch.arange(len(segments)).repeat_interleave(torch.tensor(segments.lengths))
        widest = max(len(table) for table in tables)
        table = torch.tensor([[*table, *[0] * (widest - len(table))] for table in tables])
        pages = table[owners, positions // BLOCK].to(k.device)
        places = (positions % BLOCK).to(k.device)
        self.keys[pages, :, places] = k[: segments.tokens]
        self.values[pages, :, places] = v[: segments.tokens]
        return [[(self.keys[page], self.values[page]) for page in table] for table in tables]

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
