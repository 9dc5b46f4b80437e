"""The weight files of a folder: every header read before any tensor, each tensor mapped when it is asked for.

Nothing here executes what it reads: pickles are refused by their names and never opened.
"""

import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemotron_h.checkpoint.names import INDEX_FILE, WEIGHTS_FILE, published_names
from nemotron_h.config.keys import read_object, short, shown
from nemotron_h.errors import CheckpointError

LONGEST = 255  # bytes of a file's name
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Weights:
    """The tensors of a checkpoint folder, by published name, in the order of its files."""

    def __init__(self, folder: Path) -> None:
        """Raises: CheckpointError where a file is missing or damaged, or the index says something else."""
        self.folder = folder
        files = weight_files(folder)
        held = {name: set(opened(folder / name).keys()) for name in dict.fromkeys(files.values())}
        for file_name, names in held.items():
            check_held(names, {name for name, where in files.items() if where == file_name}, folder / file_name)
        self.size_bytes = sum((folder / name).stat().st_size for name in held)
        stored = published_names(name for file_name in held for name in sorted(held[file_name]))
        self._places = {name: (files[under], under) for name, under in stored.items()}
        self._open: tuple[str, Any] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped. One file is open at a time, so ask in the order of `names`."""
        file_name, under = self._places[name]
        if self._open is None or self._open[0] != file_name:
            self._open = (file_name, opened(self.folder / file_name))
        try:
            tensor: Tensor = self._open[1].get_tensor(under)
        except SafetensorError as error:
            raise CheckpointError(f"{shown(name)}: must be readable; got {_line(error)} in {self.folder}") from None
        return tensor


def weight_files(folder: Path) -> dict[str, str]:
    """Which file of the folder holds each tensor, by its stored name."""
    if (folder / INDEX_FILE).exists():
        return _read_index(folder / INDEX_FILE)
    if not (folder / WEIGHTS_FILE).exists():
        others = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        hint = (
            f"{others[0]} is a pickle, which is never loaded; convert it" if others else "is this a checkpoint folder?"
        )
        raise CheckpointError(f"{folder}: must hold {WEIGHTS_FILE} or {INDEX_FILE}; got neither; {hint}")
    return dict.fromkeys(opened(folder / WEIGHTS_FILE).keys(), WEIGHTS_FILE)


def check_held(held: set[str], listed: set[str], path: Path) -> None:
    """The index and the files agree on what each file holds."""
    if unlisted := sorted(held - listed):
        raise CheckpointError(f"{shown(unlisted[0])}: is in {path} but not there by {INDEX_FILE}")
    if absent := sorted(listed - held):
        raise CheckpointError(f"{shown(absent[0])}: must be in {path} by {INDEX_FILE}; it is not there")


def opened(path: Path) -> Any:
    """A safetensors file, its header checked. Raises: CheckpointError naming the file."""
    if path.exists() and not path.is_file():  # opening a pipe would wait
        raise CheckpointError(f"{path}: must be a file; got something else")
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: must exist; found no such file; was the last shard copied?") from None
    except (SafetensorError, OSError, struct.error) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: must be a whole safetensors file; got {size:,} bytes that are not ({_line(error)}); copy it again"
        ) from None


def _read_index(path: Path) -> dict[str, str]:
    files = read_object(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(f"{path}: weight_map must map tensors to file names; got {short(files)}")
    for name, file_name in files.items():
        if not _is_plain(file_name):
            raise CheckpointError(
                f"{path}: {shown(name)} must be in a .safetensors file of this folder; got {short(file_name)}"
            )
    return files


def _is_plain(file_name: str) -> bool:
    """A name that a file of this folder may have, on any file system."""
    inside = Path(file_name).name == file_name and file_name.endswith(".safetensors")
    return inside and file_name.isprintable() and len(file_name.encode()) <= LONGEST


def _line(error: Exception) -> str:
    return shown(" ".join(str(error).split()))
