"""What the kernel says of a call of a few rows is what the definitions say."""

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


@given(CALLS, st.sampled_from((1, 4, 16)), st.integers(0, 2))
def test_tables_are_those_of_the_definitions(calls: list[tuple[int, int]], multiple: int, spare: int) -> None:
    starts, lengths = zip(*calls, strict=True)
    segments = Segments(starts, lengths, multiple)
    assert segments.few
    tables = [[100 * s + block for block in range(-(-(a + n) // BLOCK))] for s, (a, n) in enumerate(calls)]
    paging = Paging.of(tables, segments, max(map(len, tables)) + spare)
    want = (*segments.tables, *paging.tables)
    *_, starts_at, _, lengths_at, table, _, _ = range(len(want))
    given_ones = {starts_at, lengths_at, table}
    got = [own.copy() if place in given_ones else np.full_like(own, -77) for place, own in enumerate(want)]
    tables_of_few(1, *got)
    for own, one in zip(got, want, strict=True):
        assert np.array_equal(own, one)


def test_chunks_pieces_and_pages_end_where_they_should() -> None:
    """Each edge by itself: a row before it, at it and after it."""
    for edge in (64, BLOCK):
        for start in range(edge - 2, edge + 3):
            for length in (1, 2, 3):
                segments = Segments((start,), (length,), 1)
                paging = Paging.of([[7, 8]], segments)
                got = [own.copy() for own in (*segments.tables, *paging.tables)]
                tables_of_few(1, *got)
                assert got[-1].tolist() == [place % BLOCK for place in range(start, start + length)]
                assert got[-2].tolist() == [7 + place // BLOCK for place in range(start, start + length)]
                assert torch.equal(torch.from_numpy(got[6]), segments.offsets)
