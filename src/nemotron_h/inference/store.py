"""Snapshots in a folder: what memory has no room for, and what was read before the process began.

A file is a session of one snapshot (`session_file.py`), named by what it is bound to. The folder has a limit: the
longest unused goes. It belongs to one process at a time. Files of another model or arithmetic lie there unused until
they go.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_h.checkpoint.files import claimed, remove_leftovers
from nemotron_h.errors import CapacityError, DataError
from nemotron_h.inference import session_file
from nemotron_h.inference.prefix import Keys, Kind, Prefixes, Snapshot
from nemotron_h.model import fingerprint

LOG = logging.getLogger(__name__)
SUFFIX = ".snapshot"


@dataclass
class File:
    path: Path
    size_bytes: int
    snapshot: Snapshot | None  # its place in the tree; None: of another model or arithmetic


class Store:
    """The snapshots of a folder that this model can use, found by their keys."""

    def __init__(self, folder: Path, limit_bytes: int, model: Mapping[str, Any], arithmetic: Mapping[str, Any]) -> None:
        """model, arithmetic: fingerprints. Raises: CheckpointError where another process has the folder."""
        self.folder, self.limit_bytes, self.model, self.arithmetic = folder, limit_bytes, model, arithmetic
        folder.mkdir(parents=True, exist_ok=True)
        self._claim = ExitStack()
        self._claim.enter_context(claimed(folder, instead="name another folder"))
        remove_leftovers(folder)
        self._tree, self._numbers = Prefixes(()), count()
        self._files: dict[str, File] = {}  # by name, the longest unused first
        for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns):
            self._files[path.name] = File(path, path.stat().st_size, self._indexed(path))
        self._shrink()

    def close(self) -> None:
        """Let the folder go."""
        self._claim.close()

    def clear(self) -> None:
        """Remove all that this model could use: they are not to be trusted."""
        for name in [name for name, file in self._files.items() if file.snapshot is not None]:
            self._remove(name)

    def match(self, keys: Keys, salt: str) -> tuple[int, Path | None]:
        """How many keys the deepest snapshot of the folder has read, and its file."""
        while (snapshot := self._tree.match(keys, digest(salt)).snapshot) is not None:
            for file in self._files.values():
                if file.snapshot is snapshot:
                    return snapshot.node.end, file.path
            self._tree.drop(snapshot)  # the writing of its file was interrupted
        return 0, None

    def get(self, path: Path) -> tuple[list[tuple[int, Kind]], dict[str, Tensor]]:
        """A file's place and tensors; it is the latest used now. A damaged one is removed. Raises: DataError."""
        try:
            header, tensors = session_file.read(path)
        except DataError:
            self._remove(path.name)
            raise
        self._files[path.name] = self._files.pop(path.name)
        os.utime(path)
        return [(place, Kind(kind)) for place, kind in header.snapshots], tensors

    def put(self, keys: Keys, salt: str, kind: Kind, tensors: Mapping[str, Tensor]) -> None:
        """Write a snapshot, unless it is there; where the disk does not take it, say so and go on."""
        whose = fingerprint.digest_of([self.model, self.arithmetic, digest(salt)])
        name = hashlib.sha256(whose.encode() + keys.tobytes()).hexdigest()[:32] + SUFFIX
        size = sum(tensor.nbytes for tensor in tensors.values()) + keys.nbytes
        if name in self._files or size > self.limit_bytes:
            return
        header = session_file.Header(
            snapshots=[(len(keys), kind)],
            prompt_tokens=len(keys),
            sampling=None,
            model=dict(self.model),
            arithmetic=dict(self.arithmetic),
            inexact=False,
            extra={"salt": digest(salt)},
        )
        self._shrink(size)
        try:
            session_file.write(self.folder / name, header, {"ids": torch.from_numpy(keys), **tensors})
        except CapacityError as error:
            LOG.warning("a snapshot is not kept: %s", error)
            return
        path = self.folder / name
        self._files[name] = File(path, path.stat().st_size, self._taken(keys, digest(salt), kind))
        self._shrink()  # with its header

    def _indexed(self, path: Path) -> Snapshot | None:
        try:
            header, ids = session_file.read_header(path)
            session_file.check_agrees(path, header, self.model, self.arithmetic, inexact=False)
        except DataError as error:
            LOG.info("not used: %s", error)
            return None
        ((_, kind),) = header.snapshots
        return self._taken(ids.numpy(), str(header.extra["salt"]), Kind(kind))

    def _taken(self, keys: Keys, salt: str, kind: Kind) -> Snapshot | None:
        node = self._tree.insert(keys, salt)
        if node.snapshot is not None:
            self._tree.drop(node.snapshot)  # of a file whose writing was interrupted, or of the same
        self._tree.free.append(next(self._numbers))
        snapshot, _ = self._tree.offer(node, kind)
        return snapshot

    def _shrink(self, more_bytes: int = 0) -> None:
        """Remove the longest unused, until so many more bytes find room."""
        total = sum(file.size_bytes for file in self._files.values())
        for name in list(self._files):
            if total + more_bytes <= self.limit_bytes:
                return
            total -= self._files[name].size_bytes
            self._remove(name)

    def _remove(self, name: str) -> None:
        file = self._files[name]
        if file.snapshot is not None and file.snapshot.kept:
            self._tree.drop(file.snapshot)
        file.path.unlink(missing_ok=True)
        del self._files[name]


def digest(salt: str) -> str:
    """What a file says of its salt: salts may be secrets."""
    return hashlib.sha256(salt.encode()).hexdigest()
