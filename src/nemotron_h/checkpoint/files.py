"""Folders and large files written whole or not at all.

Either is filled under a hidden name beside its own, flushed to disk, and renamed: a reader sees all of it or nothing,
whenever the writer was killed. What exists is never written over.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from nemotron_h.errors import CapacityError, CheckpointError
from nemotron_h.files import PARTIAL, flush_path, hidden, replacing


@contextmanager
def new_folder(folder: Path, *, need_bytes: int = 0) -> Iterator[Path]:
    """A hidden folder to fill, which becomes `folder` when the block ends well and is removed when it does not.

    need_bytes: checked against the free disk before anything is written.
    Raises: CheckpointError where `folder` exists; CapacityError where the disk is too small or does not take it.
    """
    refuse_existing(folder, "folder")
    partial = hidden(folder)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with claimed_for_writing(partial, folder):
        try:
            with writing(folder):
                for leftover in partial.iterdir():
                    remove(leftover)
                refuse_too_large(folder, need_bytes)
                yield partial
                for file in partial.iterdir():
                    flush_path(file)
                flush_path(partial)
                refuse_existing(folder, "folder")
                partial.rename(folder)
                flush_path(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def claimed_for_writing(partial: Path, folder: Path) -> Iterator[None]:
    """Make the hidden folder, or take over a killed writer's, for this process alone.

    Raises: CheckpointError where another process is at work on it.
    """
    with writing(folder):
        partial.mkdir(exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(handle), partial.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False  # held, or just renamed or removed by who held it
        if not mine:
            raise CheckpointError(
                f"{folder}: must not be in the making; another process writes it; wait, or name another"
            )
        yield
    finally:
        os.close(handle)


@contextmanager
def new_file(path: Path, *, need_bytes: int = 0) -> Iterator[BinaryIO]:
    """The same for one file: open, under its hidden name, to be filled."""
    refuse_existing(path, "file")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(hidden(path))
        refuse_too_large(path, need_bytes)
        with replacing(path) as file:
            yield file


def refuse_existing(path: Path, kind: str) -> None:
    """kind: a folder or a file, as the message calls it."""
    if path.exists():
        raise CheckpointError(f"{path}: must not exist, nothing is written over; name another {kind}")


def refuse_too_large(path: Path, need_bytes: int) -> None:
    """More than the disk has free, in a folder that is there."""
    free = shutil.disk_usage(path.parent).free
    if need_bytes > free:
        raise CapacityError(
            f"{path}: needs {need_bytes:,} bytes of disk; {free:,} are free; free some or save elsewhere"
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file or folder where the disk does not take what is written. Raises: CapacityError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CapacityError(f"{path}: could not be written: {reason}; what was there is untouched") from error


@contextmanager
def claimed(folder: Path, *, instead: str = "name another run") -> Iterator[None]:
    """Hold an existing folder for this process, until the block or the process ends. instead: what else one may do.

    Raises: CheckpointError where another process holds it.
    """
    with locked(folder / ".lock", str(folder), instead=instead):
        yield


@contextmanager
def locked(lock: Path, what: str, *, instead: str) -> Iterator[None]:
    """Hold what a file is the lock of, likewise; its folder is made where there is none."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{what}: must not be in use; another process has it; wait, or {instead}") from None
        yield


def remove_leftovers(parent: Path) -> None:
    """Remove what killed writers left unfinished in a folder."""
    for leftover in parent.glob(f".*{PARTIAL}"):
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a file or folder where there is one; a folder loses its name first, so that no half of it is read."""
    if path.is_dir():
        shutil.rmtree(path if path.name.endswith(PARTIAL) else path.rename(hidden(path)))
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace one small file, whole or not at all. Raises: CapacityError where the disk does not take it."""
    with writing(path), replacing(path) as file:
        file.write(text.encode())
