"""Folders appear whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_h.checkpoint.files import claimed, new_file, new_folder, remove, remove_leftovers, write_text
from nemotron_h.errors import CapacityError, CheckpointError
from tests.full_disk import full_disk


def test_a_folder_has_its_name_only_when_it_is_filled(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as partial:
        (partial / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "b") as partial:
        (partial / "file").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("old")
    with pytest.raises(CheckpointError, match="must not exist"), new_folder(tmp_path / "b"):
        pytest.fail("entered")
    assert (tmp_path / "b" / "file").read_text() == "old"


def test_leftovers_of_a_killed_writer_are_replaced(tmp_path: Path) -> None:
    stale = tmp_path / ".a[1].partial"  # a name that a glob would read otherwise
    stale.mkdir()
    (stale / "half").write_text("half")
    with new_folder(tmp_path / "a[1]") as partial:
        assert list(partial.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["a[1]"]


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "m"
    words = r"m: must not be in the making; another process writes it; wait, or name another$"
    with new_folder(target) as first:
        (first / "a").write_text("first")
        with pytest.raises(CheckpointError, match=words), new_folder(target):
            pytest.fail("both write it")
        assert (first / "a").read_text() == "first"
    assert (target / "a").read_text() == "first"


def test_who_comes_first_stays(tmp_path: Path) -> None:
    """A folder that came to be meanwhile, by another program."""
    with (
        pytest.raises(CheckpointError, match=r"m: must not exist, nothing is written over"),
        new_folder(tmp_path / "m"),
    ):
        (tmp_path / "m").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_remove_leftovers_takes_hidden_files_and_folders_alone(tmp_path: Path) -> None:
    (tmp_path / ".step-1.partial").mkdir()
    (tmp_path / ".file.partial").write_text("half")
    (tmp_path / "step-2").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_a_removed_folder_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step").mkdir()

    def killed(path: Path) -> None:
        assert not (tmp_path / "step").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "step")
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_said_with_both_numbers(tmp_path: Path) -> None:
    needs = r"b: needs 1,000,000,000,000,000 bytes of disk; [\d,]+ are free"
    with pytest.raises(CapacityError, match=needs), new_folder(tmp_path / "b", need_bytes=10**15):
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CapacityError, match=r"file/b: could not be written: "), new_folder(tmp_path / "file" / "b"):
        pytest.fail("entered")


def test_write_text_replaces(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "two"


def test_write_text_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(CapacityError, match=r"/a: could not be written: File too large; .*untouched"), full_disk(3000):
        write_text(tmp_path / "a", "new" * 3000)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nemotron_h.checkpoint.files import claimed\n"
        "with claimed(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="must not be in use"), claimed(tmp_path):
            pytest.fail("entered")
        other.kill()
    with claimed(tmp_path):  # the lock ends with its process, however that ends
        pass


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / ".b.partial").mkdir()  # what a killed writer of a folder left
    with new_file(tmp_path / "b") as file:
        file.write(b"x")
        assert not (tmp_path / "b").exists()
    assert (tmp_path / "b").read_bytes() == b"x"
    with pytest.raises(CheckpointError, match="nothing is written over; name another file"), new_file(tmp_path / "b"):
        pytest.fail("entered")
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a" / "c") as file:
        raise KeyboardInterrupt
    with (
        pytest.raises(CapacityError, match="c: needs 1,000,000,000,000,000 "),
        new_file(tmp_path / "c", need_bytes=10**15),
    ):
        pytest.fail("entered")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b"]
