"""Token shards: Megatron's pair of files, written once, then mapped.

    NAME.bin   the tokens of all sequences back to back
    NAME.idx   magic, version u64, dtype code u8, sequences S u64, document marks M u64,
               sequence lengths i32 (S), their byte offsets in .bin i64 (S), document marks i64 (M)

A document is the sequences between two marks: the first mark is 0, the last S. All little-endian.
Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from nemotron_h.errors import DataError, UnsupportedError
from nemotron_h.files import flush, replacing

MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # by code; 6 and 7 are floats, no tokens
SMALL_VOCABULARY = 65_500  # under it, tokens take two bytes
MAX_SEQUENCE = 2**31 - 1  # lengths are int32


def shard_files(name: Path) -> tuple[Path, Path]:
    """NAME.bin and NAME.idx."""
    return name.with_name(name.name + ".bin"), name.with_name(name.name + ".idx")


class ShardWriter:
    """Writes one shard, a document at a time, each as one sequence.

        with ShardWriter(Path("train"), vocab_size=4096) as writer:
            writer.add_document(ids)

    The files take their names when the block ends well; until then, and after an error, an older shard stays.
    Raises: OSError naming the file that the disk does not take.
    """

    def __init__(self, name: Path, *, vocab_size: int) -> None:
        if vocab_size < 1 or vocab_size > MAX_SEQUENCE:
            raise DataError(f"vocab_size: must lie in 1..{MAX_SEQUENCE}; got {vocab_size}")
        self._bin, self._idx = shard_files(name)
        self._vocab_size = vocab_size
        self._code = 8 if vocab_size < SMALL_VOCABULARY else 4
        self._lengths: list[int] = []
        self._pair = self._written()

    def add_document(self, tokens: Sequence[int] | NDArray[Any]) -> None:
        """Append one document. Raises: DataError where it is empty or a token is no id of the vocabulary."""
        number = len(self._lengths)
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not 0 < len(ids) <= MAX_SEQUENCE:
            raise DataError(f"document {number}: must be 1 to {MAX_SEQUENCE} tokens in a row; got shape {ids.shape}")
        if ids.dtype.kind not in "iu":
            raise DataError(f"document {number}: must hold integers; got {ids.dtype}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            rule = f"tokens must lie in 0..{self._vocab_size - 1}"
            raise DataError(f"document {number}: {rule}; got {low if low < 0 else high}")
        self._tokens.write(ids.astype(DTYPES[self._code]).tobytes())
        self._lengths.append(len(ids))

    def __enter__(self) -> Self:
        self._tokens = self._pair.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pair.__exit__(kind, error, trace)

    @contextmanager
    def _written(self) -> Iterator[BinaryIO]:
        """The file to write tokens to, and after them the index."""
        self._bin.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._bin) as tokens:
            yield tokens
            if not self._lengths:
                raise DataError(f"{self._bin}: must hold a document; got none")
            with replacing(self._idx) as index:
                index.write(_index(self._lengths, self._code))
                for file in (tokens, index):  # the disk has taken both before the older shard goes
                    flush(file)
                self._bin.unlink(missing_ok=True)  # so that old tokens never stand beside a new index


def _index(lengths: list[int], code: int) -> bytes:
    sizes = np.array(lengths, "<i8") * np.dtype(DTYPES[code]).itemsize
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    header = HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1)
    marks = np.arange(len(lengths) + 1)
    return header + b"".join(
        [np.array(lengths, "<i4").tobytes(), offsets.astype("<i8").tobytes(), marks.astype("<i8").tobytes()]
    )


class Shard:
    """A shard on disk; its tokens are mapped, not read.

    tokens: all of them, one after the other, in the file's dtype, read-only
    starts: int64, where each sequence begins in tokens, and one past the last
    document_starts: int64, where each document begins in tokens, and one past the last
    """

    def __init__(self, name: Path) -> None:
        """Raises: DataError where a file is missing, truncated or not what its header says; UnsupportedError where
        sequences have modes (multimodal data)."""
        binary, index = shard_files(name)
        for file in (binary, index):
            if not file.is_file():
                raise DataError(f"{file}: must be a file of a shard; got no such file; write the shard again")
        dtype, lengths, offsets, marks = _read_index(index)
        self.name = name
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if not np.array_equal(offsets, self.starts[:-1] * dtype.itemsize):
            raise DataError(f"{index}: byte offsets must follow from the lengths, with no gaps; got others")
        want, got = int(self.starts[-1]) * dtype.itemsize, binary.stat().st_size
        if got != want:
            rule = f"must be {want} bytes long, as {index.name} says"
            raise DataError(f"{binary}: {rule}; got {got}; write the shard again")
        self.document_starts = self.starts[marks]
        self.tokens: NDArray[Any] = np.memmap(binary, dtype, "r") if got else np.empty(0, dtype)

    def __len__(self) -> int:
        """How many sequences."""
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> NDArray[Any]:
        """The tokens of one sequence."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence: must lie in 0..{len(self) - 1}; got {index}")
        return self.tokens[self.starts[index] : self.starts[index + 1]]


def _read_index(path: Path) -> tuple[np.dtype[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The dtype of tokens, sequence lengths, byte offsets and document marks, checked against each other."""
    data = path.read_bytes()
    if len(data) < HEADER.size:
        raise DataError(
            f"{path}: must begin with {HEADER.size} bytes of header; got {len(data)}; write the shard again"
        )
    magic, version, code, sequences, num_marks = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise DataError(f"{path}: must begin with {MAGIC!r}; got {magic!r}; is it a Megatron .idx file?")
    if version != VERSION:
        raise DataError(f"{path}: version must be {VERSION}; got {version}")
    if code not in DTYPES:
        raise DataError(f"{path}: dtype code must be that of an integer, one of {sorted(DTYPES)}; got {code}")
    want = HEADER.size + 12 * sequences + 8 * num_marks
    if sequences and len(data) == want + sequences:
        raise UnsupportedError(f"{path}: modes (multimodal data) are not read; got one for each sequence")
    if len(data) != want:
        rule = f"must be {want} bytes long for {sequences} sequences and {num_marks} document marks"
        raise DataError(f"{path}: {rule}; got {len(data)}; write the shard again")
    lengths = np.frombuffer(data, "<i4", sequences, HEADER.size)
    offsets = np.frombuffer(data, "<i8", sequences, HEADER.size + 4 * sequences)
    marks = np.frombuffer(data, "<i8", num_marks, HEADER.size + 12 * sequences)
    if (lengths < 0).any():
        raise DataError(f"{path}: sequence lengths must not be negative; got {lengths.min()}")
    if num_marks < 1 or marks[0] != 0 or marks[-1] != sequences or (np.diff(marks) < 0).any():
        raise DataError(f"{path}: document marks must rise from 0 to {sequences}; got others")
    return np.dtype(DTYPES[code]), lengths, offsets, marks
