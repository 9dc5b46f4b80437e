import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_h.errors import ShapeError
from nemotron_h.grid import BLOCK, CHUNK, PIECE, ROWS
from nemotron_h.ops.segments import Segments

SHAPES = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), min_size=1, max_size=6)


def of(pairs: list[tuple[int, int]]) -> Segments:
    return Segments(tuple(start for start, _ in pairs), tuple(length for _, length in pairs))


@given(SHAPES)
def test_every_row_stands_where_its_sequence_puts_it(pairs: list[tuple[int, int]]) -> None:
    segments = of(pairs)
    assert segments.rows % ROWS == 0
    assert 0 <= segments.rows - sum(length for _, length in pairs) < ROWS
    row = 0
    positions, chunk_at = segments.positions(torch.device("cpu")).tolist(), 0
    for index, (start, length) in enumerate(pairs):
        boundary = (start - 1) // CHUNK * CHUNK if start else 0  # where the chunk at hand begins
        for offset in range(length):
            position = start + offset
            place = chunk_at * CHUNK + position - boundary
            assert segments.owners[row] == index
            assert segments.offsets[row] == offset
            assert positions[row] == position
            assert segments.places[row] == place
            owner, begin, count, first = (of_chunk[place // CHUNK] for of_chunk in segments.grid)
            assert owner == index
            assert first <= row < first + count
            assert begin + row - first == place % CHUNK
            row += 1
        assert segments.last_rows[index] == row - 1
        assert segments.carried[index] == start - boundary
        assert segments.chunk_runs[index].tolist() == [chunk_at, -(-(start + length - boundary) // CHUNK)]
        used = segments.chunk_runs[index][1]
        assert [owner == index for owner in segments.grid[0][chunk_at : chunk_at + segments.room[index]]] == [
            place < used for place in range(segments.room[index])
        ]
        chunk_at += segments.room[index]
    assert segments.num_chunks == chunk_at
    assert (segments.offsets[row:] == -1).all()


@given(SHAPES)
def test_spread_then_collect_gives_the_rows_back(pairs: list[tuple[int, int]]) -> None:
    segments = of(pairs)
    values = torch.arange(1.0, segments.rows + 1)[:, None].expand(-1, 2).contiguous()
    chunks = segments.spread(values)
    assert chunks.shape == (segments.num_chunks, CHUNK, 2)
    assert torch.equal(chunks.flatten(0, 1)[segments.places], values[: segments.tokens])
    assert int((chunks != 0).any(-1).sum()) == segments.tokens
    back = segments.collect(chunks)
    assert torch.equal(back[: segments.tokens], values[: segments.tokens])
    assert (back[segments.tokens :] == 0).all()


@given(SHAPES)
def test_pieces_are_all_the_rows_once_and_never_cross_a_multiple(pairs: list[tuple[int, int]]) -> None:
    segments = of(pairs)
    rows = []
    for owner, row, count, first in zip(*segments.pieces, strict=True):
        assert first == segments.positions(torch.device("cpu"))[row]
        assert segments.owners[row] == owner
        if segments.few and count == 0:
            continue
        assert segments.owners[row + count - 1] == owner
        assert count >= 1
        assert first // PIECE == (first + count - 1) // PIECE
        rows += range(row, row + count)
    assert rows == list(range(segments.tokens))
    assert BLOCK % PIECE == 0


def test_the_shapes_of_a_call_of_a_few_rows_follow_from_its_lengths() -> None:
    def shapes(starts: tuple[int, ...], lengths: tuple[int, ...]) -> list[object]:
        segments = Segments(starts, lengths, 1)
        tables = (*segments.grid, *segments.pieces, segments.chunk_runs, segments.owners, segments.offsets)
        return [segments.num_chunks, *(tuple(table.shape) for table in tables)]

    for lengths in ((1,), (1, 1, 1), (5,), (16, 1, 9)):
        found = [shapes((start,) * len(lengths), lengths) for start in range(1, 140)]
        found.append(shapes(tuple(range(60, 60 + len(lengths))), lengths))
        assert all(one == found[0] for one in found)


@given(SHAPES)
def test_what_was_held_comes_before_what_is_new(pairs: list[tuple[int, int]]) -> None:
    segments = of(pairs)
    chunks = segments.spread(torch.ones(segments.rows, 2))
    held = torch.full((len(segments), CHUNK, 2), 7.0)
    joined = segments.after_kept(chunks, held, dim=1)
    assert segments.after_kept(chunks, None, dim=1) is chunks
    places = joined.flatten(0, 1)
    assert (places[segments.places] == 1).all()
    assert int((places == 7).any(-1).sum()) == sum(segments.carried)
    for first, count in zip(segments.chunk_begins, segments.carried, strict=True):
        assert (joined[first, :count] == 7).all()


@pytest.mark.parametrize(
    ("documents", "lengths"),
    [
        ([[0, 0, 0]], (3,)),
        ([[4, 4, 9]], (2, 1)),
        ([[7, 7], [7, 7]], (2, 2)),  # a document never runs from one row into the next
        ([[1, 2, 1]], (1, 1, 1)),  # the same number again, after another: another document
        ([[0, 0, 1, 1], [1, 2, 2, 2]], (2, 2, 1, 3)),
    ],
)
def test_documents_begin_where_their_number_changes(documents: list[list[int]], lengths: tuple[int, ...]) -> None:
    segments = Segments.of_documents(torch.tensor(documents))
    assert segments.lengths == lengths
    assert segments.starts == (0,) * len(lengths)


def test_a_batch_is_a_segment_for_each_row() -> None:
    assert Segments.of_batch(2, 5) == Segments((0, 0), (5, 5))
    assert Segments.of_batch(2, 5, starts=[3, 9]) == Segments((3, 9), (5, 5))
    assert len(Segments.of_batch(3, 1)) == 3


@given(SHAPES, st.sampled_from([1, 2, 8, 16, 64]))
def test_a_call_is_padded_to_the_multiple_and_its_chunks_come_back(pairs: list[tuple[int, int]], multiple: int) -> None:
    starts, lengths = zip(*pairs, strict=True)
    segments = Segments(starts, lengths, multiple)
    assert segments.rows % multiple == 0
    assert 0 <= segments.rows - segments.tokens < multiple
    assert len(segments.owners) == len(segments.offsets) == segments.rows
    values = torch.arange(1.0, segments.rows + 1)
    assert torch.equal(segments.collect(segments.spread(values))[: segments.tokens], values[: segments.tokens])


def test_every_way_to_segments_passes_the_multiple_on() -> None:
    assert Segments((0,), (5,)).multiple == ROWS
    assert Segments.of_batch(2, 5, multiple=16).rows == 16
    assert Segments.of_documents(torch.tensor([[0, 0, 1]]), multiple=8).rows == 8


@pytest.mark.parametrize("multiple", [0, -4, 3, 128])
def test_a_multiple_that_does_not_divide_a_chunk_is_refused(multiple: int) -> None:
    with pytest.raises(ShapeError, match=rf"^multiple: must divide 64; got {multiple}$"):
        Segments((0,), (1,), multiple)


@pytest.mark.parametrize(
    ("starts", "lengths"), [((), ()), ((0,), (1, 1)), ((0,), (0,)), ((-1,), (1,)), ((0, 0), (4, -2))]
)
def test_impossible_segments_are_refused(starts: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"^segments: must have"):
        Segments(starts, lengths)
