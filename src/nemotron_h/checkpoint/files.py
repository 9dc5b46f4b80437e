"""Folders written whole or not at all.

A folder is filled under a hidden name beside its own, flushed to disk, and renamed: a reader sees all of it or nothing,
whenever the writer was killed. An existing folder is never written over.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemotron_h.errors import CapacityError, CheckpointError

PARTIAL = ".partial"  # the end of a hidden name; leftovers of a killed writer are removed by the next


@contextmanager
def new_folder(folder: Path, *, need_bytes: int = 0) -> Iterator[Path]:
    """A hidden folder to fill, which becomes `folder` when the block ends well and is removed when it does not.

    need_bytes: checked against the free disk before anything is written.
    Raises: CheckpointError where `folder` exists; CapacityError where the disk is too small or fills up.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: must not exist, nothing is written over; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent, folder.name)
    free = shutil.disk_usage(folder.parent).free
    if need_bytes > free:
        raise CapacityError(
            f"{folder}: needs {need_bytes:,} bytes of disk; {free:,} are free; free some or save elsewhere"
        )
    partial = folder.parent / f".{folder.name}{PARTIAL}"
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            flush(file)
        flush(partial)
        partial.rename(folder)
        flush(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CapacityError(
            f"{folder}: could not be written: {error.strerror or error}; nothing else was changed"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_leftovers(parent: Path, name: str = "*") -> None:
    """Remove what killed writers left unfinished."""
    for leftover in parent.glob(f".{name}{PARTIAL}"):
        shutil.rmtree(leftover)


def flush(path: Path) -> None:
    """Wait until a file or a folder's entries are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace one small file, whole or not at all."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.replace(path)
