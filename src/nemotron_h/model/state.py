"""All that a model remembers between calls, passed in: `logits = model(tokens, state)`.

Each Mamba layer keeps the recurrent state at a chunk boundary and the inputs since; each attention layer keeps keys and
values in pages of BLOCK tokens. State alone writes this storage, in place, but for the boundaries, which the scan moves
on as it goes. The storage may be its own, or rows and pages of pools that somebody else hands out and takes back: a
slice of a pool is a tensor like any other.

Invariant: a position holds the tokens before it; places of a chunk or page not yet written reach no result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from nemotron_h.config.model import AttentionConfig, MambaConfig, ModelConfig
from nemotron_h.errors import ShapeError
from nemotron_h.grid import AHEAD, BLOCK, CHUNK, ROWS
from nemotron_h.machine import use_small_pages
from nemotron_h.ops.attention import keep_rows
from nemotron_h.ops.conv import keep_last, ring_places
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.shapes import expect
from nemotron_h.ops.ssd import Past, keep_inputs

New = Callable[..., Tensor]  # torch.zeros, or torch.empty for storage that somebody fills before it is read


@dataclass(slots=True)
class MambaState:
    """What one Mamba layer remembers of b sequences. The recurrent state and B stand turned, as products read them."""

    conv: Tensor  # (b, kernel - 1 + AHEAD, channels), model dtype, a ring by place, see `ops/conv.py`
    boundary: Tensor  # (b, h, n, p), float32, at the beginning of the chunk at hand
    x: Tensor  # (b, h, CHUNK, p), model dtype, inputs of the chunk at hand
    dt: Tensor  # (b, h, CHUNK), float32, after softplus
    B: Tensor  # (b, g, n, CHUNK), model dtype

    @classmethod
    def of(cls, config: MambaConfig, batch: int, dtype: torch.dtype, device: torch.device, new: New) -> Self:
        h, p, n, g = config.num_heads, config.head_dim, config.state_size, config.num_groups

        def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return new(batch, *shape, dtype=dtype, device=device)

        return cls(
            conv=tensor(config.conv_kernel - 1 + AHEAD, config.conv_channels),
            boundary=tensor(h, n, p, dtype=torch.float32),
            x=tensor(h, CHUNK, p),
            dt=tensor(h, CHUNK, dtype=torch.float32),
            B=tensor(g, n, CHUNK),
        )

    @property
    def past(self) -> Past:
        """What the scan reads of it; the boundary it moves on itself."""
        return Past(self.boundary, self.x, self.B)

    def push(self, xbc: Tensor, convolved: Tensor, dt: Tensor, segments: Segments) -> None:
        """Remember a call: xbc and convolved (rows, channels), the conv's inputs and outputs; dt (c, h, CHUNK) of its
        chunks."""
        keep_last(xbc, segments, self.conv)
        keep_inputs(convolved, dt, segments, self.x, self.B, self.dt)


@dataclass(frozen=True, slots=True)
class Paging:
    """Where the sequences of a call have their keys and values, and where its new rows go: the same in every layer."""

    table: Tensor  # (s, blocks) int64, the pages of each sequence in order, 0 beyond its last
    pages: Tensor  # (rows,) int64, the page of each new row, -1 for padding
    places: Tensor  # (rows,) int64, and its place there

    @classmethod
    def of(cls, tables: Sequence[Sequence[int]], segments: Segments, blocks: int = 0) -> Self:
        """blocks: that the table has room for, at least."""
        widest = max(blocks, *(len(table) for table in tables))
        table = np.zeros((len(tables), widest), dtype=np.int64)
        for own, pages in zip(table, tables, strict=True):
            own[: len(pages)] = pages
        owners, offsets = segments.owners.numpy(), segments.offsets.numpy()
        positions = np.maximum(offsets, 0) + segments.spans[0][owners]
        found = table, np.where(offsets >= 0, table[owners, positions // BLOCK], -1), positions % BLOCK
        return cls(*map(torch.from_numpy, found))

    @property
    def tables(self) -> tuple[Any, ...]:
        """As arrays of numpy."""
        return self.table.numpy(), self.pages.numpy(), self.places.numpy()

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

    keys: Tensor  # (pages, k, d, BLOCK), model dtype or int8, turned: a query's product reads a block row by row
    values: Tensor  # (pages, k, BLOCK, d), likewise
    scales: Tensor  # (pages, 2, k, BLOCK), float32, of codes in int8; (pages, 0, k, BLOCK) where they are none

    @classmethod
    def of(cls, config: AttentionConfig, pages: int, dtype: torch.dtype, device: torch.device, new: New) -> Self:
        """dtype: of keys and values."""
        k, d = config.num_kv_heads, config.head_dim
        return cls(
            keys=new((pages, k, d, BLOCK), dtype=dtype, device=device),
            values=new((pages, k, BLOCK, d), dtype=dtype, device=device),
            scales=new((pages, 2 if dtype == torch.int8 else 0, k, BLOCK), dtype=torch.float32, device=device),
        )

    @property
    def scales_of_codes(self) -> Tensor | None:
        return self.scales if self.scales.shape[1] else None

    def push(self, k: Tensor, v: Tensor, paging: Paging) -> None:
        """Write new rows k and v (rows, kv, d) to their pages."""
        keep_rows(k, v, paging.pages, paging.places, self.keys, self.values, self.scales_of_codes)

    def grow(self, pages: int) -> None:
        """Append pages of zeros."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            setattr(self, field.name, torch.cat((tensor, tensor.new_zeros(pages, *tensor.shape[1:]))))


@dataclass(slots=True)
class State:
    """What a model remembers of b sequences: their positions, their page tables, and each layer's part."""

    positions: list[int]
    tables: list[list[int]]  # of each sequence: the pages of its blocks, in order, the same in every attention layer
    layers: list[MambaState | AttentionState | None]
    own_pages: bool = False  # else somebody hands them out, through the tables
    moving: bool = False  # a call is writing to it, or was interrupted while it did

    @classmethod
    def zeros(
        cls,
        config: ModelConfig,
        batch: int,
        *,
        dtype: torch.dtype,
        keys_values: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """A state before the first token, with storage of its own. dtype: the model's; keys_values: theirs, where it is
        another."""
        layers = _layers(config, batch, 0, (dtype, keys_values or dtype), torch.device(device), torch.zeros)
        return cls([0] * batch, [[] for _ in range(batch)], layers, own_pages=True)

    @classmethod
    def pool(
        cls,
        config: ModelConfig,
        slots: int,
        pages: int,
        *,
        dtype: torch.dtype,
        keys_values: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Storage for so many sequences and pages, that somebody hands out: not filled, and on a CPU not even taken
        from the machine before it is written. A sequence begins with `restart`, or as a copy of another."""
        layers = _layers(config, slots, pages, (dtype, keys_values or dtype), torch.device(device), torch.empty)
        return cls([0] * slots, [[] for _ in range(slots)], layers)

    def __len__(self) -> int:
        return len(self.positions)

    def use_small_pages(self, first: int) -> None:
        """For sequences from this one on, which are written and copied, not computed with."""
        for layer in self._mamba():
            for tensor in _tensors(layer):
                use_small_pages(tensor[first:])

    def segments(self, lengths: Sequence[int], multiple: int = ROWS, rows: range | None = None) -> Segments:
        """The segments of a call that gives each sequence that many new tokens, with pages for all of them. multiple:
        what the call's rows are padded to; rows: neighbours that the call is of, all where None."""
        part = slice(None) if rows is None else slice(rows.start, rows.stop)
        positions, tables = self.positions[part], self.tables[part]
        if len(lengths) != len(positions):
            raise ShapeError(
                f"tokens: must hold one row for each sequence of the state; got {len(lengths)}, {len(positions)}"
            )
        for position, table, length in zip(positions, tables, lengths, strict=True):
            table.extend(self._pages(-(-(position + length) // BLOCK) - len(table)))
        return Segments(tuple(positions), tuple(lengths), multiple)

    def _pages(self, count: int) -> list[int]:
        """Numbers of fresh pages; the storage grows by a quarter at least, so that a long sequence rarely copies it."""
        pools = self._attention()
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

    def part(self, rows: range) -> "State":
        """Neighbouring sequences as a state of their own, which writes to this one's storage: what a call takes.
        `follow` it after the call."""
        layers = [_sliced(layer, rows) if isinstance(layer, MambaState) else layer for layer in self.layers]
        return State(self.positions[rows.start : rows.stop], self.tables[rows.start : rows.stop], layers)

    def follow(self, part: "State", rows: range) -> None:
        """The sequences of a part have moved on, as it says of itself."""
        self.positions[rows.start : rows.stop] = part.positions

    def go_back(self, index: int, count: int) -> None:
        """A sequence's last tokens were read in vain: what they left lies beyond its position, where nothing is read.

        At most AHEAD of them, all in the chunk of the one before; `go_on` says of the first that it counts after all.
        """
        place = self.positions[index] - count
        if not 0 <= count <= AHEAD or place < 1 or (place - 1) // CHUNK != (self.positions[index] - 1) // CHUNK:
            raise ShapeError(
                f"count: must be 0..{AHEAD}, and leave the sequence in its chunk of {CHUNK}; got {count} of "
                f"{self.positions[index]}"
            )
        self.positions[index] = place

    def go_on(self, index: int) -> None:
        """The first token that a sequence has gone back by counts after all."""
        self.positions[index] += 1

    def restart(self, index: int) -> None:
        """A new sequence begins here."""
        self.positions[index], self.tables[index] = 0, []
        for layer in self._mamba():
            layer.conv[index].zero_()
            layer.boundary[index].zero_()

    def copy_slot(self, source: int, target: int) -> None:
        """Sequence target becomes what sequence source is. Their tables then name the same pages."""
        self.positions[target], self.tables[target] = self.positions[source], list(self.tables[source])
        for layer in self._mamba():
            for tensor in _tensors(layer):
                tensor[target].copy_(tensor[source])

    def copy_page(self, source: int, target: int) -> None:
        for layer in self._attention():
            for tensor in _tensors(layer):
                tensor[target].copy_(tensor[source])

    def poison_slot(self, index: int) -> None:
        """Fill it with NaN: whoever reads it before it is written shows it."""
        self.positions[index], self.tables[index] = 0, []
        for layer in self._mamba():
            for tensor in _tensors(layer):
                tensor[index].fill_(torch.nan)

    def poison_pages(self, pages: Sequence[int]) -> None:
        for layer in self._attention():
            for tensor in _tensors(layer):
                for page in pages:
                    tensor[page].fill_(torch.nan if tensor.is_floating_point() else -1)  # a code's scale is NaN

    def difference(self, one: int, other: int) -> str | None:
        """The first place where two sequences of this state are not the same bits, in words; None: nowhere. Page
        numbers may differ, and what is never read."""
        if self.positions[one] != self.positions[other]:
            return f"positions {self.positions[one]} and {self.positions[other]}"
        for index, layer in enumerate(self.layers):
            if layer is None:
                continue
            for name, mine in self._remembered(layer, one).items():
                if not same_bits(mine, self._remembered(layer, other)[name]):
                    return f"layer {index}, {name}"
        return None

    def saved(self, index: int, *, paged: bool = True) -> dict[str, Tensor]:
        """All that will be read of one sequence, by `layer.name`, copied. paged: keys and values too."""
        return {
            f"{number}.{name}": tensor.clone(memory_format=torch.contiguous_format)
            for number, layer in enumerate(self.layers)
            if isinstance(layer, MambaState) or (paged and isinstance(layer, AttentionState))
            for name, tensor in self._remembered(layer, index).items()
        }

    def load(self, index: int, position: int, table: Sequence[int], saved: Mapping[str, Tensor]) -> None:
        """Make a sequence what was `saved` at that position, its keys and values, where they are given, in the pages of
        table. Raises: ShapeError where a tensor is missing or another one."""
        self.positions[index], self.tables[index] = position, list(table)
        paged = any(name.endswith(".keys") for name in saved)
        for number, layer in enumerate(self.layers):
            if isinstance(layer, MambaState):
                for name, place in self._remembered(layer, index).items():
                    given = _expected(saved, f"{number}.{name}", place.shape, place.dtype)
                    if name == "conv":  # what is older in the ring is not read
                        layer.conv[index, _newest(layer, position)] = given.to(place.device)
                    else:
                        place.copy_(given)
            elif isinstance(layer, AttentionState) and paged:
                _, k, d, _ = layer.keys.shape
                keys = _expected(saved, f"{number}.keys", (k, d, position), layer.keys.dtype)
                values = _expected(saved, f"{number}.values", (k, position, d), layer.values.dtype)
                scales = layer.scales.new_empty(0, k, position)
                if layer.scales_of_codes is not None:
                    scales = _expected(saved, f"{number}.scales", (2, k, position), torch.float32)
                for page, begin in zip(table, range(0, position, BLOCK), strict=True):
                    new = slice(begin, begin + BLOCK)
                    count = min(BLOCK, position - begin)
                    layer.keys[page, :, :, :count] = keys[:, :, new]
                    layer.values[page, :, :count] = values[:, new]
                    layer.scales[page, :, :, :count] = scales[:, :, new]

    def _remembered(self, layer: MambaState | AttentionState, index: int) -> dict[str, Tensor]:
        """All that will be read of one sequence in a layer."""
        position, table = self.positions[index], self.tables[index]
        if isinstance(layer, AttentionState):
            keys = layer.keys[table].permute(1, 2, 0, 3).flatten(2)  # (k, d, places)
            values = layer.values[table].transpose(0, 1).flatten(1, 2)  # (k, places, d)
            kept = {"keys": keys[..., :position], "values": values[:, :position]}
            if layer.scales_of_codes is not None:
                kept["scales"] = layer.scales[table].permute(1, 2, 0, 3).flatten(2)[..., :position]
            return kept
        held = Segments((position,), (1,)).carried[0]
        return {
            "conv": layer.conv[index, _newest(layer, position)],
            "boundary": layer.boundary[index],
            "x": layer.x[index, :, :held],
            "dt": layer.dt[index, :, :held],
            "B": layer.B[index, ..., :held],
        }

    def _mamba(self) -> list[MambaState]:
        return [layer for layer in self.layers if isinstance(layer, MambaState)]

    def _attention(self) -> list[AttentionState]:
        return [layer for layer in self.layers if isinstance(layer, AttentionState)]

    @property
    def size_bytes(self) -> int:
        """Of all tensors it points to."""
        return sum(tensor.nbytes for layer in self.layers if layer is not None for tensor in _tensors(layer))


def _newest(layer: MambaState, position: int) -> Tensor:
    """Where the conv's ring holds the inputs that the next token reads, newest last."""
    ring = layer.conv.shape[1]
    return ring_places(position, ring - AHEAD, ring)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Stricter than equal numbers: 0 is not -0, and NaN may be the same."""
    return torch.equal(*(tensor.contiguous().view(torch.uint8) for tensor in (one, other)))


def _expected(saved: Mapping[str, Tensor], name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if name not in saved:
        raise ShapeError(f"{name}: must be part of the state; got none")
    expect(saved[name], name, tuple(shape), dtype)
    return saved[name]


def slot_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of one sequence's recurrent state."""
    return State.pool(config, 1, 0, dtype=dtype, device="meta").size_bytes


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of one page, in all attention layers together. dtype: of keys and values."""
    return State.pool(config, 0, 1, dtype=dtype, device="meta").size_bytes


def _layers(
    config: ModelConfig, slots: int, pages: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device, new: New
) -> list[MambaState | AttentionState | None]:
    layers: list[MambaState | AttentionState | None] = []
    for layer in config.layers:
        match layer:
            case MambaConfig():
                layers.append(MambaState.of(layer, slots, dtypes[0], device, new))
            case AttentionConfig():
                layers.append(AttentionState.of(layer, pages, dtypes[1], device, new))
            case _:
                layers.append(None)
    return layers


def _tensors(layer: MambaState | AttentionState) -> list[Tensor]:
    return [getattr(layer, field.name) for field in fields(layer)]


def _sliced(layer: MambaState, rows: range) -> MambaState:
    return MambaState(*(tensor[rows.start : rows.stop] for tensor in _tensors(layer)))


def _picked(
    layer: MambaState | AttentionState | None, rows: Tensor, pages: Tensor
) -> MambaState | AttentionState | None:
    if layer is None:
        return None
    index = rows if isinstance(layer, MambaState) else pages
    return type(layer)(*(tensor[index] for tensor in _tensors(layer)))
