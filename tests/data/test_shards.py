import os
import re
import struct
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_h.data.shards import HEADER, MAX_SEQUENCE, Shard, ShardWriter
from nemotron_h.errors import DataError, UnsupportedError
from tests.full_disk import full_disk

DOCUMENTS = st.lists(st.lists(st.integers(0, 59_999), min_size=1, max_size=9), min_size=1, max_size=9)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=DOCUMENTS)
def test_what_is_written_is_read(shard_of: Callable[..., Shard], documents: list[list[int]]) -> None:
    shard = shard_of(documents)
    assert [shard[i].tolist() for i in range(len(shard))] == documents
    assert shard.tokens.tolist() == [token for document in documents for token in document]
    begins = shard.document_starts.tolist()
    assert [shard.tokens[i:j].tolist() for i, j in pairwise(begins)] == documents


def test_bytes_are_megatrons(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "two", vocab_size=65_499) as writer:
        writer.add_document([1, 258, 3])
        writer.add_document(np.array([65_498]))
    assert (tmp_path / "two.bin").read_bytes() == bytes([1, 0, 2, 1, 3, 0, 0xDA, 0xFF])
    want = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    want += struct.pack("<ii", 3, 1) + struct.pack("<qq", 0, 6) + struct.pack("<qqq", 0, 1, 2)
    assert (tmp_path / "two.idx").read_bytes() == want


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32), (131_072, np.int32)])
def test_width_follows_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    with ShardWriter(tmp_path / "s", vocab_size=vocab_size) as writer:
        writer.add_document([0, vocab_size - 1])
    shard = Shard(tmp_path / "s")
    assert shard.tokens.dtype == dtype
    assert shard[0].tolist() == [0, vocab_size - 1]


def test_a_document_of_many_sequences_is_read(tmp_path: Path) -> None:
    lengths, marks = [2, 0, 3, 1], [0, 3, 3, 4]
    index = HEADER.pack(b"MMIDIDX\0\0", 1, 1, 4, 4)
    index += struct.pack("<4i", *lengths) + struct.pack("<4q", 0, 2, 2, 5) + struct.pack("<4q", *marks)
    (tmp_path / "s.idx").write_bytes(index)
    (tmp_path / "s.bin").write_bytes(bytes(range(6)))
    shard = Shard(tmp_path / "s")
    assert [shard[i].tolist() for i in range(4)] == [[0, 1], [], [2, 3, 4], [5]]
    assert shard.document_starts.tolist() == [0, 5, 5, 6]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "document 1: must be 1 to"),
        ([[1, 2]], "document 1: must be 1 to"),
        ([1.5], "document 1: must hold integers; got float64"),
        ([3, 100], r"document 1: tokens must lie in 0\.\.99; got 100"),
        ([3, -1], r"document 1: tokens must lie in 0\.\.99; got -1"),
    ],
)
def test_a_refused_document_leaves_the_old_shard(tmp_path: Path, document: list[int], message: str) -> None:
    with ShardWriter(tmp_path / "s", vocab_size=100) as writer:
        writer.add_document([7])
    with pytest.raises(DataError, match=message), ShardWriter(tmp_path / "s", vocab_size=100) as writer:
        writer.add_document([8])
        writer.add_document(document)
    assert Shard(tmp_path / "s").tokens.tolist() == [7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx"]


@pytest.mark.parametrize(
    ("documents", "name"),
    [
        ([[8] * 10_000] * 3, "s.bin"),  # beyond the buffer: while documents come
        ([[8] * 3000], "s.bin"),
        ([[8]] * 200, "s.idx"),
    ],
)
def test_a_full_disk_names_the_file_and_leaves_the_old_shard(
    tmp_path: Path, documents: list[list[int]], name: str
) -> None:
    with ShardWriter(tmp_path / "s", vocab_size=100) as writer:
        writer.add_document([7])
    with (
        pytest.raises(OSError, match="File too large") as caught,
        full_disk(3000),
        ShardWriter(tmp_path / "s", vocab_size=100) as writer,
    ):
        for document in documents:
            writer.add_document(document)
    assert caught.value.filename == str(tmp_path / name)
    assert Shard(tmp_path / "s").tokens.tolist() == [7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx"]


@pytest.mark.parametrize("call", range(4))
def test_an_old_half_never_stands_beside_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Killed before any of the calls that change names, a shard is the old one, the new one, or refused."""

    def killed(real: Callable[..., object]) -> Callable[..., object]:
        def wrapped(path: Path, *args: object, **options: object) -> object:
            calls.append(path)
            if len(calls) > call:
                raise KeyboardInterrupt
            return real(path, *args, **options)

        return wrapped

    calls: list[Path] = []
    for token in (7, 8):
        writer = ShardWriter(tmp_path / "s", vocab_size=100)
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            if token == 8:
                patch.setattr(Path, "unlink", killed(Path.unlink))
                patch.setattr(Path, "replace", killed(Path.replace))
            with writer:
                writer.add_document([token])
    assert len(calls) >= min(call + 1, 3)
    if 0 < call < 3:
        with pytest.raises(DataError, match="must be a file of a shard; got no such file"):
            Shard(tmp_path / "s")
    else:
        assert Shard(tmp_path / "s").tokens.tolist() == [8 if call else 7]


def test_both_files_are_on_disk_before_the_old_shard_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.add(os.fstat(handle).st_ino))
    for token in (7, 8):
        with ShardWriter(tmp_path / "s", vocab_size=100) as writer:
            writer.add_document([token])
    assert {path.stat().st_ino for path in (*tmp_path.iterdir(), tmp_path)} <= flushed


def test_no_documents_make_no_shard(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"s\.bin: must hold a document; got none"),
        ShardWriter(tmp_path / "s", vocab_size=100),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="vocab_size"):
        ShardWriter(tmp_path / "s", vocab_size=MAX_SEQUENCE + 1)


@pytest.mark.parametrize("name", ["s.bin", "s.idx"])
def test_a_missing_file_is_named(tmp_path: Path, shard_of: Callable[..., Shard], name: str) -> None:
    shard_of([[1, 2]])
    (tmp_path / name.replace("s.", "shard.")).unlink()
    with pytest.raises(DataError, match=re.escape(name[1:]) + ": must be a file of a shard"):
        Shard(tmp_path / "shard")


def test_every_truncation_is_refused(tmp_path: Path, shard_of: Callable[..., Shard]) -> None:
    shard_of([[1, 2], [3]])
    for name in ("shard.bin", "shard.idx"):
        whole = (tmp_path / name).read_bytes()
        for kept in range(len(whole)):
            (tmp_path / name).write_bytes(whole[:kept])
            with pytest.raises(DataError, match=name):
                Shard(tmp_path / "shard")
        (tmp_path / name).write_bytes(whole)
    assert Shard(tmp_path / "shard").tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("place", "put", "message"),
    [
        (0, b"X", "must begin with b'MMIDIDX"),
        (9, b"\x02", "version must be 1; got 2"),
        (17, b"\x06", "dtype code must be that of an integer, .* got 6"),
        (17, b"\x09", "dtype code must be that of an integer, .* got 9"),
        (17, b"\x04", "must be 12 bytes long, as shard.idx says; got 6|byte offsets"),
        (18, b"\x03", "bytes long for 3 sequences"),
        (26, b"\x04", "and 4 document marks"),
        (34, struct.pack("<i", -2), "must not be negative; got -2"),
        (42, b"\x02", "byte offsets must follow"),
        (58, b"\x01", "document marks must rise from 0 to 2"),
        (74, b"\x01", "document marks must rise from 0 to 2"),
    ],
)
def test_damage_is_named(tmp_path: Path, shard_of: Callable[..., Shard], place: int, put: bytes, message: str) -> None:
    shard_of([[1, 2], [3]])
    index = tmp_path / "shard.idx"
    data = bytearray(index.read_bytes())
    data[place : place + len(put)] = put
    index.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        Shard(tmp_path / "shard")
    assert "\n" not in str(caught.value)


def test_modes_are_refused_by_name(tmp_path: Path, shard_of: Callable[..., Shard]) -> None:
    shard_of([[1, 2], [3]])
    with (tmp_path / "shard.idx").open("ab") as file:
        file.write(bytes(2))
    with pytest.raises(UnsupportedError, match="modes"):
        Shard(tmp_path / "shard")


def test_a_sequence_outside_is_refused(shard_of: Callable[..., Shard]) -> None:
    shard = shard_of([[1, 2], [3]])
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"got {index}"):
            shard[index]
