"""What stands for a checkpoint: a path, a name in the cache, a name to ask for, or nothing; and who is asked."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import HFValidationError, validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from nemotron_h.checkpoint.download import resolve
from nemotron_h.checkpoint.hub import HubName, cache_folder, cached, find, missing, read_cache
from nemotron_h.errors import CheckpointError
from tests.checkpoint.stub_hub import COMMIT, Model, StubHub, connected

NAME = "org/model"
SMALL = {"config.json": b"{}", "model.safetensors": b"weights"}
INDEXED = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ).encode(),
    "model-1.safetensors": b"one",
    "model-2.safetensors": b"two",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with connected(tmp_path / "home", monkeypatch) as stub:
        yield stub


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("nvidia/Nemotron-H-8B-Base-8K", "nvidia/Nemotron-H-8B-Base-8K", "main"),
        ("a/b@v1.0", "a/b", "v1.0"),
        ("a/b@refs/pr/1", "a/b", "refs/pr/1"),
        (f"a_b/c.d@{COMMIT}", "a_b/c.d", COMMIT),
    ],
)
def test_a_name_is_read(text: str, repository: str, revision: str) -> None:
    name = HubName.read(text)
    assert name == HubName(repository, revision)
    assert HubName.read(str(name)) == name


@pytest.mark.parametrize(
    "text",
    ["a", "a/b/c", "./a/b", "../a", "/a/b", "~/a", "a/..", "a/.b", "a/b@", "a/b@../c", "a/b@c/../d", "a/b@/c", "a//b",
     "a--b/c", "a/b..c", "a/b.git", "a/b-", "é/b", "a/b c", "a/b\n", f"a/{'b' * 97}", "https://a/b", "a\\b/c"],
)  # fmt: skip
def test_what_is_no_name(text: str) -> None:
    assert HubName.read(text) is None


@given(st.text(alphabet="ab1_.-/@é \n", max_size=12))
def test_the_library_takes_every_name_and_no_name_leaves_the_cache(text: str) -> None:
    name = HubName.read(text)
    if name is None:
        return
    try:
        validate_repo_id(name.repository)
    except HFValidationError as error:
        pytest.fail(str(error))
    refs = Path("/cache/refs")
    assert (refs / name.revision).resolve().is_relative_to(refs)


def test_a_folder_that_exists_wins(hub: StubHub) -> None:
    hub.models[NAME] = Model(SMALL)
    Path(NAME).mkdir(parents=True)
    assert resolve(NAME) == Path(NAME)
    assert resolve(f"{NAME}/") == Path(NAME)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nothing", []),
        ("./org/model", []),
        ("/org/model", []),
        ("org/model/deeper", []),
        (Path("org/model"), []),  # a Path is a path
        ("org/mo..del", ["no name on the Hub (org/name or org/name@revision)"]),
        ("runs/laptop", ["no such folder in runs", "nemotron-h pull runs/laptop"]),
    ],
)
def test_a_mistyped_path_asks_nobody(hub: StubHub, path: str | Path, words: list[str]) -> None:
    Path("runs").mkdir()
    with pytest.raises(CheckpointError, match="must be a checkpoint folder; got no such folder") as refused:
        resolve(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert all(word in str(refused.value) for word in words), refused.value
    assert ("Hub" in str(refused.value)) == bool(words)
    assert hub.requests == []


def test_a_name_is_downloaded_once(hub: StubHub) -> None:
    hub.models[NAME] = Model(SMALL)
    assert find(NAME) == HubName(NAME)
    folder = resolve(NAME)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == SMALL
    count = len(hub.requests)
    assert find(NAME) == resolve(NAME) == resolve(f"{NAME}@{COMMIT}") == cached(HubName(NAME)) == folder
    (Path("org")).mkdir()  # now a path begins like it: the cache is looked into all the same
    assert resolve(NAME) == folder
    assert len(hub.requests) == count


def test_a_revision_is_its_own_snapshot(hub: StubHub) -> None:
    hub.models[NAME] = Model(SMALL)
    first = resolve(NAME)
    hub.models[NAME] = Model({**SMALL, "config.json": b'{"new": 1}'}, commit="f" * 40, revisions=("v2", "refs/pr/1"))
    second = resolve(f"{NAME}@v2")
    assert (first / "config.json").read_bytes() == b"{}"
    assert (second / "config.json").read_bytes() == b'{"new": 1}'
    assert resolve(f"{NAME}@refs/pr/1") == second
    assert resolve(NAME) == first
    assert hub.asked("model.safetensors")[1:] == []  # the same bytes, by their digest


def test_what_lacks_a_shard_is_no_checkpoint(hub: StubHub) -> None:
    hub.models[NAME] = Model(INDEXED)
    folder = resolve(NAME)
    assert missing(folder) == ()
    (folder / "model-2.safetensors").unlink()
    assert missing(folder) == ("model-2.safetensors",)
    assert missing(folder, weights=False) == ()
    assert find(NAME) == HubName(NAME)
    assert find(NAME, weights=False) == folder
    assert resolve(NAME) == folder  # completed
    assert missing(folder) == ()


@pytest.mark.parametrize("index", [b"{", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_left_to_whoever_loads_it(tmp_path: Path, index: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    assert missing(tmp_path) in ((), ("3",))


def test_a_name_that_no_file_has_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("x" * 300, "\0", "\ud800"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        assert missing(tmp_path) == (name,)


def test_a_cache_that_is_a_file_is_named(hub: StubHub) -> None:
    cache_folder().parent.mkdir()
    cache_folder().write_text("")
    with pytest.raises(CheckpointError, match=rf"^{cache_folder()}: must be the folder of the cache; got a file; "):
        read_cache()


def test_the_cache_of_other_programs_is_ours(hub: StubHub) -> None:
    """huggingface_hub finds what we fetched, and we what it fetched."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    hub.models[NAME] = Model(SMALL)
    folder = resolve(NAME)
    assert try_to_load_from_cache(NAME, "config.json", cache_dir=cache_folder()) == str(folder / "config.json")
    assert hf_hub_download(NAME, "model.safetensors", local_files_only=True) == str(folder / "model.safetensors")


def test_the_cache_is_listed(hub: StubHub) -> None:
    assert read_cache().held == ()
    hub.models[NAME] = Model(INDEXED)
    hub.models["org/other"] = Model(SMALL, commit="e" * 40)
    whole, other = resolve(NAME), resolve("org/other@" + "e" * 40)
    (other / "model.safetensors").unlink()
    (other.parents[1] / "blobs" / "abc.incomplete").write_bytes(bytes(1000))
    (cache_folder() / "models--org--damaged").mkdir()
    cache = read_cache()
    assert cache.unreadable == 1
    first, second = cache.held
    assert (first.name, first.commit, first.folder, first.missing) == (HubName(NAME), COMMIT, whole, ())
    assert first.size_bytes == sum(map(len, INDEXED.values()))
    assert (second.name, second.missing) == (HubName("org/other", "e" * 40), ("model.safetensors",))
    assert second.size_bytes == 2 + 1000


def test_the_loader_imports_no_library_of_the_hubs() -> None:
    code = "import sys, nemotron_h.inference.load; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_path_needs_no_http(tmp_path: Path) -> None:
    code = f"""
import sys
from nemotron_h.checkpoint.hub import find
find({str(tmp_path)!r})
assert not {{"httpx", "httpx2", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
