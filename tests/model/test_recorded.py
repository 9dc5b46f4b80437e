"""Calls that are run again from a record of their launches have the bits of calls that are made anew."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from nemotron_h.grid import BLOCK, CHUNK
from nemotron_h.model import recorded as room
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.recorded import Calls
from nemotron_h.model.state import State
from nemotron_h.ops.jit.kernels import Recording
from tests.model import shapes

SLOTS = 3


def built(name: str, precision: str) -> Hybrid:
    model = deepcopy(shapes.model(name, torch.bfloat16))
    if precision != "bfloat16":
        shapes.in_integers(model, precision)
    model.requires_grad_(False)
    model.pack()
    model.row_multiple = 1 if model.quantized else model.row_multiple
    return model.eval()


def pool(model: Hybrid, starts: list[int], tokens: Tensor) -> State:
    """Storage in which sequences have read that much of their tokens, and have pages for the rest."""
    blocks = -(-tokens.shape[1] // BLOCK)
    state = State.pool(model.config, SLOTS, SLOTS * blocks, dtype=model.compute_dtype)
    for row, start in enumerate(starts):
        state.restart(row)
        state.tables[row] = list(range(row * blocks, (row + 1) * blocks))
        part = state.part(range(row, row + 1))
        model.hidden(tokens[row, :start], part.segments([start], model.row_multiple), part)
        state.follow(part, range(row, row + 1))
    return state


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each recorded call that is run again."""
    runs: list[int] = []
    replay = Recording.replay

    def run(self: Recording) -> None:
        runs.append(1)
        replay(self)

    monkeypatch.setattr(Recording, "replay", run)
    return runs


def steps(calls: Calls, tokens: Tensor, lengths: list[list[int]]) -> list[Tensor]:
    """Logits of each sequence's new rows, call after call."""
    model, state = calls.model, calls.state
    parts: list[list[Tensor]] = [[] for _ in lengths[0]]
    for of_call in lengths:
        rows = range(len(of_call))
        at = state.positions[: len(of_call)]
        segments = state.segments(of_call, model.row_multiple, rows)
        new = torch.cat([tokens[row, a : a + n] for row, (a, n) in enumerate(zip(at, of_call, strict=True))])
        logits = calls(new.tolist(), segments, rows)
        if logits is None:
            part = state.part(rows)
            logits = model.logits(model.hidden(new, segments, part))
            state.follow(part, rows)
        for own, begin, count in zip(parts, segments.begins, of_call, strict=True):
            own.append(logits[begin : begin + count])
    return [torch.cat(own) for own in parts]


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["8b", "ssm"])
@torch.no_grad()
def test_a_token_at_a_time_over_chunks_and_blocks(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(name, precision)
    length = BLOCK + CHUNK + 9
    tokens = shapes.random_tokens(SLOTS, length, seed=1)
    starts = [BLOCK - 5, CHUNK - 1, 3]
    runs = counted(monkeypatch)
    got = steps(Calls(model, pool(model, starts, tokens)), tokens, [[1] * SLOTS] * 70)
    whole = [model(row[None])[0] for row in tokens]
    for row, start in enumerate(starts):
        assert torch.equal(got[row], whole[row][start : start + 70])
    recordable = model.quantized or all(one.kernel is not None for one in model.matrices.values())
    assert len(runs) == (69 if recordable else 0)


@torch.no_grad()
def test_a_few_tokens_at_a_time_and_other_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("8b", "int4")
    tokens = shapes.random_tokens(SLOTS, 300, seed=2)
    starts = [40, 61, 1]
    lengths = [[5, 1, 2], [1, 1], [5, 1, 2], [16], [1, 1], [5, 1, 2], [1], [17, 1, 1], [5, 1, 2], [1, 1]]
    runs = counted(monkeypatch)
    calls = Calls(model, pool(model, starts, tokens))
    parts: list[list[Tensor]] = [[] for _ in starts]
    for of_call in lengths:
        for own, new in zip(parts, steps(calls, tokens, [of_call]), strict=False):
            own.append(new)
    for row, (own, start) in enumerate(zip(parts, starts, strict=True)):
        got = torch.cat(own)
        assert torch.equal(got, model(tokens[row : row + 1])[0][start : start + len(got)])
    assert len(runs) == 5  # of ten, four are first of their kind, and one has too many rows


@torch.no_grad()
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rows_may_be_anybodys(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One recording serves every split of its rows among its sequences, with more and less padding, over the edges of
    chunks and pages."""
    model = built("8b", precision)
    model.row_multiple = 8
    tokens = shapes.random_tokens(SLOTS, 320, seed=6)
    splits = [[5, 1, 2], [1, 6, 1], [2, 2, 1], [1, 1, 1], [1, 1, 6], [3, 4, 1], [6, 1, 1]]
    lengths = (splits + [[1, 1, 1]] * 4) * 2
    runs = counted(monkeypatch)
    starts = [40, 61, 250]
    parts: list[list[Tensor]] = [[] for _ in starts]
    calls = Calls(model, pool(model, starts, tokens))
    for of_call in lengths:
        for own, new in zip(parts, steps(calls, tokens, [of_call]), strict=True):
            own.append(new)
    for row, (own, start) in enumerate(zip(parts, starts, strict=True)):
        got = torch.cat(own)
        assert torch.equal(got, model(tokens[row : row + 1])[0][start : start + len(got)]), row
    assert len(runs) == len(lengths) - 1


@torch.no_grad()
def test_what_a_call_gave_stays_as_it_was() -> None:
    model = built("8b", "int8")
    tokens = shapes.random_tokens(SLOTS, 60, seed=3)
    calls = Calls(model, pool(model, [10], tokens))
    given, copies = [], []
    for at in range(10, 14):
        segments = calls.state.segments([1], 1, range(1))
        logits = calls([int(tokens[0, at])], segments, range(1))
        assert logits is not None
        given.append(logits)
        copies.append(logits.clone())
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


@torch.no_grad()
def test_where_torch_computes_nothing_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE is torch's: such a call is made anew, with the same result."""
    model = built("t-8b", "int8")
    tokens = shapes.random_tokens(SLOTS, 80, seed=4)
    runs = counted(monkeypatch)
    got = steps(Calls(model, pool(model, [20], tokens)), tokens, [[1]] * 30)
    assert torch.equal(got[0], model(tokens[:1])[0][20:50])
    assert not runs


@torch.no_grad()
def test_changed_weights_are_read_anew_once_it_forgets() -> None:
    model = built("8b", "int4")
    tokens = shapes.random_tokens(SLOTS, 60, seed=5)
    calls = Calls(model, pool(model, [10], tokens))
    steps(calls, tokens, [[1]] * 3)
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.mul_(1.25)
    calls.forget()
    calls.state = pool(model, [13], tokens)
    got = steps(calls, tokens, [[1]] * 3)
    assert torch.equal(got[0], model(tokens[:1])[0][13:16])


@torch.no_grad()
def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MOST_ROWS", 5)
    model = built("8b", "int4")
    tokens = shapes.random_tokens(SLOTS, 200, seed=6)
    calls = Calls(model, pool(model, [10], tokens))
    got = steps(calls, tokens, [[1], [2], [3], [1], [4], [1], [2], [3]])
    assert torch.equal(got[0], model(tokens[:1])[0][10:27])
    assert len(calls._calls) == 2


@torch.no_grad()
def test_it_may_be_left_off() -> None:
    model = built("8b", "int4")
    tokens = shapes.random_tokens(SLOTS, 60, seed=7)
    calls = Calls(model, pool(model, [10], tokens), recorded=False)
    assert calls([int(tokens[0, 10])], calls.state.segments([1], 1, range(1)), range(1)) is None
    assert calls.state.positions[0] == 10
