"""What a general compressor makes of held-out bytes: alone, and after it has seen the training bytes."""

import lzma
from collections.abc import Callable

from nemotron_h.errors import DataError

PRESET = 6  # xz's own default; lower ones are faster and find shorter copies
COMPRESSED_AT_ONCE = 1 << 18  # bytes between two reports of progress
READ_AT_ONCE = 16  # compressed bytes: how exactly the place where held-out bytes begin is known


def xz_bits_per_byte(train: bytes | None, held_out: bytes, *, progress: Callable[[float], None] | None = None) -> float:
    """Compressed bits for each held-out byte.

    train: compressed first and not counted; its end is where the one stream of both begins to give held-out bytes. The
    dictionary holds all of it, so a held-out text that repeats a training text costs a few bytes: after training bytes
    the number is low because source trees hold near copies of their files, not because xz learnt to predict.
    progress: called with the fraction done. One core; other threads run meanwhile. Raises: DataError where held_out is
    empty.
    """
    if not held_out:
        raise DataError("held_out: must hold a byte to compress; got none")
    before = train or b""
    together = before + held_out
    size = max(1 << (len(together) - 1).bit_length(), 4096)  # 4096: the smallest dictionary xz takes
    filters = [{"id": lzma.FILTER_LZMA2, "preset": PRESET, "dict_size": size}]
    compressor = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters)
    pieces = []
    for begin in range(0, len(together), COMPRESSED_AT_ONCE):
        pieces.append(compressor.compress(together[begin : begin + COMPRESSED_AT_ONCE]))
        if progress is not None:
            progress(min(begin + COMPRESSED_AT_ONCE, len(together)) / len(together))
    compressed = b"".join([*pieces, compressor.flush()])
    return 8 * (len(compressed) - _beginning(compressed, len(before), filters)) / len(held_out)


def _beginning(compressed: bytes, skipped: int, filters: list[dict[str, int]]) -> int:
    """How many compressed bytes give the first `skipped` bytes, to within READ_AT_ONCE."""
    reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
    given = place = 0
    while given < skipped:
        given += len(reader.decompress(compressed[place : place + READ_AT_ONCE]))
        place += READ_AT_ONCE
    return place
