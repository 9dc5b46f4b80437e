"""What kernels read of a call in which all sequences go on with a few rows, from where each stands and how many rows it
has. Definitions: `Segments.tables`, `Paging.of`. They are made here so that a call can be run again without Python."""

from typing import Any

from nemotron_h.grid import BLOCK, CHUNK, PIECE
from nemotron_h.ops.jit.kernels import kernel


@kernel(1)
def tables_of_few(
    start: Any,
    stop: Any,
    chunk_owner: Any,
    chunk_begin: Any,
    chunk_count: Any,
    chunk_first: Any,
    runs: Any,
    owners: Any,
    offsets: Any,
    piece_owner: Any,
    piece_first: Any,
    piece_count: Any,
    piece_place: Any,
    starts: Any,
    begins: Any,
    lengths: Any,
    table: Any,
    pages: Any,
    places: Any,
) -> None:
    """Of starts and lengths (segments,) and table (segments, blocks), all else. One task."""
    row = 0
    for s in range(len(starts)):
        place, count = starts[s], lengths[s]
        held = (place - 1) % CHUNK + 1
        within = min(count, CHUNK - held)  # the chunk at hand
        begins[s] = row
        chunk_owner[2 * s], chunk_begin[2 * s], chunk_count[2 * s], chunk_first[2 * s] = s, held, within, row
        chunk_owner[2 * s + 1] = s if count > within else -1
        chunk_begin[2 * s + 1], chunk_count[2 * s + 1], chunk_first[2 * s + 1] = 0, count - within, row + within
        runs[s, 0], runs[s, 1] = 2 * s, 2 if count > within else 1
        before = min(count, PIECE - place % PIECE)  # the next multiple of PIECE
        piece_owner[2 * s], piece_first[2 * s], piece_count[2 * s], piece_place[2 * s] = s, row, before, place
        after = before if count > before else 0
        piece_owner[2 * s + 1], piece_first[2 * s + 1] = s, row + after
        piece_count[2 * s + 1], piece_place[2 * s + 1] = count - before, place + after
        for k in range(count):
            owners[row], offsets[row] = s, k
            pages[row], places[row] = table[s, (place + k) // BLOCK], (place + k) % BLOCK
            row += 1
    for padding in range(row, len(owners)):
        owners[padding], offsets[padding], pages[padding], places[padding] = 0, -1, -1, starts[0] % BLOCK
