import lzma
import random

import pytest

from nemotron_h.data.xz import PRESET, xz_bits_per_byte
from nemotron_h.errors import DataError


def test_alone_is_the_size_of_the_stream() -> None:
    held_out = b"".join(f"line {i * i}\n".encode() for i in range(3000))
    stream = lzma.compress(held_out, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": PRESET}])
    assert xz_bits_per_byte(None, held_out) == 8 * len(stream) / len(held_out) == xz_bits_per_byte(b"", held_out)


def test_a_copy_costs_nothing_and_noise_all_of_itself() -> None:
    draw = random.Random(1)
    train, other = draw.randbytes(100_000), draw.randbytes(20_000)
    assert xz_bits_per_byte(train, train[30_000:50_000]) < 0.2
    assert 7.9 < xz_bits_per_byte(train, other) < 8.1


def test_after_training_is_the_difference_of_two_sizes() -> None:
    lines = [f"value_{i * 7919 % 1000} = {i * i % 977}\n".encode() for i in range(12_000)]
    train, held_out = b"".join(lines[:9000]), b"".join(lines[9000:])
    filters = [{"id": lzma.FILTER_LZMA2, "preset": PRESET}]
    small, large = (len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters)) for data in (train, train + held_out))
    # 100 bytes: a stream's end, and the block in which the two texts meet
    assert abs(xz_bits_per_byte(train, held_out) * len(held_out) / 8 - (large - small)) < 100


def test_progress_ends_at_one() -> None:
    told: list[float] = []
    xz_bits_per_byte(bytes(600_000), b"a", progress=told.append)
    assert told == sorted(told)
    assert (len(told), told[-1]) == (3, 1.0)


def test_nothing_held_out_is_refused() -> None:
    with pytest.raises(DataError, match="held_out: must hold a byte"):
        xz_bits_per_byte(b"abc", b"")
