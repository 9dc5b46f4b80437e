"""Files of a folder become documents: read, left out by named reasons, split by content, near copies named.

    files found = training documents + validation documents + files left out

Everything follows from the files' paths and contents: the same folder gives the same output, byte for byte.
"""

import hashlib
import json
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from nemotron_h.config.data import CorpusConfig
from nemotron_h.data.shingles import NearCopy, near_copies
from nemotron_h.errors import DataError
from nemotron_h.files import replacing

TRAIN, VALIDATION, REPORT = "train.jsonl", "validation.jsonl", "corpus.json"


@dataclass(frozen=True)
class Document:
    """path: relative to the corpus's source, with forward slashes."""

    path: str
    text: str


@dataclass(frozen=True)
class CorpusReport:
    """What became of every file. left_out: how many files for each reason, none of them zero."""

    files: int
    left_out: dict[str, int]
    train_documents: int
    train_bytes: int
    validation_documents: int
    validation_bytes: int
    near_copies: tuple[NearCopy, ...]  # of validation documents in training documents, the nearest first


def standard_library() -> Path:
    """The folder of Python's own library: tens of megabytes of code and prose that every machine here has."""
    return Path(sysconfig.get_path("stdlib"))


def collect(
    config: CorpusConfig, source: Path, folder: Path, *, progress: Callable[[float], None] | None = None
) -> CorpusReport:
    """Write the documents of source to folder: train.jsonl, validation.jsonl, and the report as corpus.json.

    Validation documents are those with the smallest content hashes, up to the fraction of bytes that config names; each
    side has one at least, and a text is never on both. Near copies stay in validation: the report names them.
    progress: called with the fraction done. Raises: DataError where source holds fewer than two documents, or a folder
    that cannot be listed; OSError naming the file that the disk does not take.
    """
    paths = list(_paths(config, source))
    contents: dict[bytes, tuple[str, bytes]] = {}  # by hash: of equal contents the first path stays
    left_out: Counter[str] = Counter()
    for index, path in enumerate(paths):
        content, reason = _read(source, path, config.max_document_bytes)
        key = hashlib.sha256(content).digest()
        if not reason and key in contents:
            reason = "duplicate"
        if reason:
            left_out[reason] += 1
        else:
            contents[key] = (path, content)
        _tell(progress, 0.4 * index / len(paths))
    train, validation = _split(contents, config.validation_fraction, source)
    copies = near_copies(
        validation, train, config.near_copy_fraction, progress=lambda done: _tell(progress, 0.4 + 0.5 * done)
    )
    report = CorpusReport(
        files=len(paths),
        left_out=dict(sorted(left_out.items())),
        train_documents=len(train),
        train_bytes=sum(len(content) for _, content in train),
        validation_documents=len(validation),
        validation_bytes=sum(len(content) for _, content in validation),
        near_copies=tuple(copies),
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TRAIN, map(_line, train))
    _write(folder / VALIDATION, map(_line, validation))
    _write(folder / REPORT, [json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n"])
    _tell(progress, 1.0)
    return report


def _paths(config: CorpusConfig, source: Path) -> Sequence[str]:
    """Relative paths of the files with the suffixes of config, sorted; links to folders are not followed."""
    if not source.is_dir():
        raise DataError(f"{source}: must be a folder of documents; got no such folder")
    found = []
    for name, folders, files in os.walk(source, onerror=_refuse):
        folders[:] = [folder for folder in folders if folder not in config.excluded_folders]
        inside = Path(name).relative_to(source)
        found += [(inside / file).as_posix() for file in files if Path(file).suffix in config.suffixes]
    return sorted(found)


def _refuse(error: OSError) -> NoReturn:
    rule = "must be a folder that can be listed"
    raise DataError(f"{error.filename}: {rule}; got {error.strerror}; name it in excluded_folders to leave it out")


def _read(source: Path, path: str, max_bytes: int) -> tuple[bytes, str]:
    """The content, and the reason to leave the file out, empty where there is none."""
    try:
        path.encode("utf-8")
        reason = _unfit((source / path).lstat(), max_bytes)
        content = b"" if reason else (source / path).read_bytes()
        content.decode("utf-8")
    except OSError:
        return b"", "unreadable"
    except UnicodeEncodeError:
        return b"", "name_not_utf8"
    except UnicodeDecodeError:
        return b"", "not_utf8"
    return content, reason


def _unfit(file: os.stat_result, max_bytes: int) -> str:
    """The reason not to open a file, empty where there is none."""
    if stat.S_ISLNK(file.st_mode):
        return "link"
    if not stat.S_ISREG(file.st_mode):
        return "special_file"
    if not file.st_size:
        return "empty"
    return "too_long" if file.st_size > max_bytes else ""


Texts = list[tuple[str, bytes]]  # path and content


def _split(contents: dict[bytes, tuple[str, bytes]], fraction: float, source: Path) -> tuple[Texts, Texts]:
    """Training and validation documents, each sorted by path."""
    if len(contents) < 2:
        rule = "must hold two documents or more, to train on and to hold out"
        raise DataError(f"{source}: {rule}; got {len(contents)}; name a larger folder")
    wanted = fraction * sum(len(content) for _, content in contents.values())
    train, validation, taken = [], [], 0
    for rank, (_, document) in enumerate(sorted(contents.items()), start=1):
        if taken < wanted and rank < len(contents):
            validation.append(document)
            taken += len(document[1])
        else:
            train.append(document)
    return sorted(train), sorted(validation)


def _tell(progress: Callable[[float], None] | None, done: float) -> None:
    if progress is not None:
        progress(done)


def _line(document: tuple[str, bytes]) -> str:
    path, content = document
    return json.dumps({"path": path, "text": content.decode("utf-8")}, ensure_ascii=False) + "\n"


def _write(path: Path, lines: Iterable[str]) -> None:
    with replacing(path) as file:
        file.writelines(line.encode("utf-8") for line in lines)


def documents(path: Path) -> Iterator[Document]:
    """The documents of a .jsonl file, one {"path": ..., "text": ...} a line. Raises: DataError, naming the line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _document(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: must be a readable file; got {error.strerror}; collect the corpus first") from None


def _document(line: bytes, where: str) -> Document:
    try:
        values = json.loads(line)
    except ValueError as error:  # of the JSON or of the UTF-8
        raise DataError(f"{where}: must be one JSON object; got {error}") from None
    if not isinstance(values, dict) or sorted(values) != ["path", "text"]:
        got = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise DataError(f"{where}: must hold path and text, nothing else; got {got}")
    for name, value in values.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} must be a string; got {value!r}")
    return Document(values["path"], values["text"])
