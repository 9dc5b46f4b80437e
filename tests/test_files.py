"""A file appears whole or not at all, and on disk."""

import os
from pathlib import Path

import pytest

from nemotron_h.files import replacing
from tests.full_disk import full_disk


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        before = (tmp_path / "a").read_bytes() if (tmp_path / "a").exists() else None
        with replacing(tmp_path / "a") as file:
            file.write(content)
            file.flush()
            assert ((tmp_path / "a").read_bytes() if (tmp_path / "a").exists() else None) == before
        assert (tmp_path / "a").read_bytes() == content
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_writer_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").write_bytes(b"half of something longer")
    with replacing(tmp_path / "a") as file:
        file.write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"x"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), replacing(tmp_path / "a") as file:
        file.write(b"new")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("size_bytes", [4_000, 4_000_000])  # within the buffer, beyond it
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path, size_bytes: int) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="File too large") as caught, full_disk(3000), replacing(tmp_path / "a") as file:
        file.write(bytes(size_bytes))
    assert caught.value.filename == str(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_that_is_none_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in ("nowhere", "file"):
        with pytest.raises(OSError, match="director") as caught, replacing(tmp_path / folder / "a"):
            pytest.fail("entered")
        assert caught.value.filename == str(tmp_path / folder / "a")


def test_an_error_with_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught, replacing(tmp_path / "a"):
        (tmp_path / "source").read_bytes()
    assert caught.value.filename == str(tmp_path / "source")


def test_file_and_folder_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    with replacing(tmp_path / "a") as file:
        file.write(b"x")
    assert flushed == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]
