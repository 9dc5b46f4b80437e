import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_h.config.data import CorpusConfig
from nemotron_h.data.corpus import REPORT, TRAIN, VALIDATION, collect, documents, standard_library
from nemotron_h.errors import DataError
from tests.full_disk import full_disk


def tree(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def texts(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Training and validation texts by path."""
    train, validation = (
        {document.path: document.text for document in documents(folder / name)} for name in (TRAIN, VALIDATION)
    )
    return train, validation


def test_files_are_documents_or_left_out_by_a_named_reason(tmp_path: Path) -> None:
    kept = {f"pkg/m{i}.py": f"x = {i}\r\n\u2028é\n" for i in range(40)} | {"notes/a.txt": "prose", "b.rst": "Title\n"}
    source = tree(
        tmp_path / "source",
        {
            **kept,
            "pkg/z_copy.py": kept["pkg/m7.py"],
            "pkg/empty.py": b"",
            "latin.py": b"# \xe9\n",
            "table.txt": "1" * 2000,
            "pkg/__pycache__/m.py": "cached",
            "site-packages/other.py": "installed",
            "dist-packages/deep/other.py": "installed",
            "picture.png": b"\x89PNG",
        },
    )
    (source / "link.py").symlink_to(source / "b.rst")
    (source / "gone.py").symlink_to(source / "nowhere")
    report = collect(CorpusConfig(max_document_bytes=1999), source, tmp_path / "out")
    train, validation = texts(tmp_path / "out")
    assert train | validation == kept
    assert not train.keys() & validation.keys()
    assert report.left_out == {"duplicate": 1, "empty": 1, "link": 2, "not_utf8": 1, "too_long": 1}
    assert report.files == len(kept) + 6 == len(train) + len(validation) + sum(report.left_out.values())
    assert (report.train_documents, report.validation_documents) == (len(train), len(validation))
    assert report.train_bytes == sum(len(text.encode()) for text in train.values())
    assert report.validation_bytes == sum(len(text.encode()) for text in validation.values())


def test_names_that_are_not_utf8_are_left_out(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", {"a.py": "a", "b.py": "b", "\udcff.py": "c", "\udcff/d.py": "d"})
    report = collect(CorpusConfig(), source, tmp_path / "out")
    assert report.left_out == {"name_not_utf8": 2}
    assert report.files == 4


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """Opening a pipe would wait for its writer."""
    source = tree(tmp_path / "source", {"a.py": "a", "b.py": "b"})
    os.mkfifo(source / "pipe.py")
    assert collect(CorpusConfig(), source, tmp_path / "out").left_out == {"special_file": 1}


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", {"a.py": "a", "b.py": "b", "long.txt": ""})
    os.truncate(source / "long.txt", 10**13)  # a hole: more than any memory, and nothing on disk
    assert collect(CorpusConfig(), source, tmp_path / "out").left_out == {"too_long": 1}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tree(tmp_path / "source", {"a.py": "a", "b.py": "b", "closed/c.py": "c"})
    real = os.scandir

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # whatever its mode, root may list a folder
    with pytest.raises(DataError, match=r"source/closed: must be a folder that can be listed; got Permission denied;"):
        collect(CorpusConfig(), source, tmp_path / "out")
    report = collect(CorpusConfig(excluded_folders=("closed",)), source, tmp_path / "out")
    assert report.files == 2


def test_a_full_disk_names_the_file_and_leaves_the_old_ones(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", {f"{i}.py": f"{i}" * 50 for i in range(90)})
    collect(CorpusConfig(), source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    tree(source, {"more.py": "more"})
    with pytest.raises(OSError, match="File too large") as caught, full_disk(3000):
        collect(CorpusConfig(), source, tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out" / TRAIN)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5])
def test_the_fraction_of_bytes_is_held_out(tmp_path: Path, fraction: float) -> None:
    source = tree(tmp_path / "source", {f"{i}.py": f"{i:04}" * (1 + i % 9) for i in range(500)})
    report = collect(CorpusConfig(validation_fraction=fraction), source, tmp_path / "out")
    wanted = fraction * (report.train_bytes + report.validation_bytes)
    assert wanted <= report.validation_bytes < wanted + 4 * 9  # over it by less than one document


def test_each_side_has_a_document(tmp_path: Path) -> None:
    for i in range(20):  # whichever of the two has the smaller hash
        source = tree(tmp_path / str(i), {"small.py": f"{i}", "large.py": f"{i}" * 1000})
        report = collect(CorpusConfig(), source, tmp_path / "out")
        assert (report.train_documents, report.validation_documents) == (1, 1)


def test_content_decides_and_names_do_not(tmp_path: Path) -> None:
    files = {f"{i}.py": f"text {i}" for i in range(200)}
    collect(CorpusConfig(), tree(tmp_path / "one", files), tmp_path / "out1")
    renamed = {f"other/{999 - int(name[:-3])}.txt": text for name, text in files.items()}
    collect(CorpusConfig(), tree(tmp_path / "two", renamed), tmp_path / "out2")
    for one, two in zip(texts(tmp_path / "out1"), texts(tmp_path / "out2"), strict=True):
        assert sorted(one.values()) == sorted(two.values())


def test_same_folder_same_bytes_in_path_order(tmp_path: Path) -> None:
    files = {f"{name}/{i}.py": f"{name} {i}" for i in range(30) for name in "bac"}
    collect(CorpusConfig(), tree(tmp_path / "one", files), tmp_path / "out1")
    collect(CorpusConfig(), tree(tmp_path / "two", dict(reversed(files.items()))), tmp_path / "out2")
    for name in (TRAIN, VALIDATION, REPORT):
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()
    train, _ = texts(tmp_path / "out1")
    assert list(train) == sorted(train)
    assert len(list((tmp_path / "out1").iterdir())) == 3


def test_near_copies_are_held_out_and_named(tmp_path: Path) -> None:
    long = {f"{i}.py": "".join(f"value_{i}_{j} = {i * j}\n" for j in range(400)) for i in range(40)}
    plain = collect(CorpusConfig(validation_fraction=0.05), tree(tmp_path / "source", long), tmp_path / "out")
    assert plain.near_copies == ()
    train, validation = texts(tmp_path / "out")
    held = next(iter(validation))
    # A longer copy whose hash sends it to training: the first of some candidates that does.
    for attempt in range(40):
        tree(tmp_path / "source", {"copy.py": validation[held] + f"# {attempt}\n" * 3})
        report = collect(CorpusConfig(validation_fraction=0.05), tmp_path / "source", tmp_path / "out")
        train, validation = texts(tmp_path / "out")
        if "copy.py" in train and held in validation:
            break
    [copy] = report.near_copies
    assert (copy.path, copy.near, copy.overlap_fraction) == (held, "copy.py", 1.0)
    written = json.loads((tmp_path / "out" / REPORT).read_text())
    assert written["near_copies"] == [{"path": held, "near": "copy.py", "overlap_fraction": 1.0}]


def test_progress_rises_to_one(tmp_path: Path) -> None:
    told: list[float] = []
    source = tree(tmp_path / "source", {f"{i}.py": f"{i}" for i in range(9)})
    collect(CorpusConfig(), source, tmp_path / "out", progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_the_standard_library_has_its_own_modules() -> None:
    assert (standard_library() / "json" / "decoder.py").is_file()


def test_a_folder_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: must be a folder"):
        collect(CorpusConfig(), tmp_path / "nowhere", tmp_path / "out")
    for files in ({}, {"a.py": "alone"}):
        with pytest.raises(DataError, match=f"must hold two documents or more.* got {len(files)};"):
            collect(CorpusConfig(), tree(tmp_path, files), tmp_path / "out")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.sets(st.text(min_size=1).filter(lambda text: text.isprintable() or "\n" in text), min_size=2))
def test_texts_come_back_as_they_are(tmp_path: Path, contents: set[str]) -> None:
    source = tmp_path / "source"
    for path in source.glob("*"):
        path.unlink()
    tree(source, {f"{i}.txt": text for i, text in enumerate(contents)})
    collect(CorpusConfig(), source, tmp_path / "out")
    train, validation = texts(tmp_path / "out")
    assert {*train.values(), *validation.values()} == contents


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"path": "a"', "one JSON object"),
        (b"\n", "one JSON object"),
        (b'{"path": "a", "text": "\xff"}', "one JSON object"),
        (b"[1]", "must hold path and text, nothing else; got list"),
        (b'{"path": "a"}', r"nothing else; got \['path'\]"),
        (b'{"path": "a", "text": "b", "id": 1}', r"nothing else; got \['id', 'path', 'text'\]"),
        (b'{"path": "a", "text": 3}', "text must be a string; got 3"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"path": "a", "text": "b"}\n' + line)
    with pytest.raises(DataError, match=rf"some\.jsonl:2: .*{message}"):
        list(documents(path))
    with pytest.raises(DataError, match=r"other\.jsonl: must be a readable file"):
        list(documents(tmp_path / "other.jsonl"))
