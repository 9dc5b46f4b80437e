"""Files written whole or not at all: a reader sees the old one or the new one, also after a power cut."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"  # the end of a hidden name; what a killed writer left under it is written over by the next


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A hidden file to fill, which takes the name `path` when the block ends well and is removed when it does not.

    Raises: OSError with `path` as its filename where the disk does not take it.
    """
    partial = hidden(path)
    try:
        with partial.open("wb") as file:
            try:
                yield file
                flush(file)
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)  # before the file is closed, which fails again on a full disk
                raise
        flush_path(path.parent)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(partial):  # a write's error has no name
            error.filename = str(path)
        raise


def flush(file: BinaryIO) -> None:
    """Wait until what was written to an open file is on disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_path(path: Path) -> None:
    """Wait until a file or a folder's entries are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hidden(path: Path) -> Path:
    """The name beside path that it has until it is whole."""
    return path.with_name(f".{path.name}{PARTIAL}")
