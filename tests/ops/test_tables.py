"""What the kernel says of a call of a few rows is what the definitions say."""

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_h.grid import BLOCK
from nemotron_h.model.state import Paging
from nemotron_h.ops.jit.tables import tables_of_few
from nemotron_h.ops.segments import FEW, Segments
from tests.kernels import need_kernels

need_kernels()
CALLS = st.lists(st.tuples(st.integers(1, 3 * BLOCK), st.integers(1, FEW)), min_size=1, max_size=5)


def made(segments: Segments, paging: Paging) -> list[Any]:
    """All tables as the kernel makes them: of starts, lengths and pages alone, over what is wrong everywhere."""
    want = (*segments.tables, *paging.tables)
    *_, starts, _, lengths, table, _, _ = range(len(want))
    got = [own.copy() if k in (starts, lengths, table) else np.full_like(own, -77) for k, own in enumerate(want)]
    tables_of_few(1, *got)
    return got


@given(CALLS, st.sampled_from((1, 4, 16)), st.integers(0, 2))
def test_tables_are_those_of_the_definitions(calls: list[tuple[int, int]], multiple: int, spare: int) -> None:
    starts, lengths = zip(*calls, strict=True)
    segments = Segments(starts, lengths, multiple)
    assert segments.few
    tables = [[100 * s + block for block in range(-(-(a + n) // BLOCK))] for s, (a, n) in enumerate(calls)]
    paging = Paging.of(tables, segments, max(map(len, tables)) + spare)
    for own, one in zip(made(segments, paging), (*segments.tables, *paging.tables), strict=True):
        assert np.array_equal(own, one)


def test_chunks_pieces_and_pages_end_where_they_should() -> None:
    """Each edge by itself: a row before it, at it and after it."""
    for edge in (64, BLOCK):
        for start in range(edge - 2, edge + 3):
            for length in (1, 2, 3):
                segments = Segments((start,), (length,), 1)
                paging = Paging.of([[7, 8]], segments)
                got = made(segments, paging)
                assert got[-1].tolist() == [place % BLOCK for place in range(start, start + length)]
                assert got[-2].tolist() == [7 + place // BLOCK for place in range(start, start + length)]
                assert torch.equal(torch.from_numpy(got[6]), segments.offsets)
