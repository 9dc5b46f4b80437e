"""Where a checkpoint lies: a path, or the name of a model on the Hub, `org/name[@revision]`.

A name is looked for in the cache that all programs share (huggingface_hub's; HF_HOME and HF_HUB_CACHE move it):

    models--ORG--NAME/refs/REVISION           the commit a branch or tag stood at
                      snapshots/COMMIT/FILE   a link to
                      blobs/DIGEST            the bytes

Only a string can be a name, and never one that a path of this machine begins: a mistyped path asks nobody.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import huggingface_hub
from huggingface_hub import constants

from nemotron_h.checkpoint.names import INDEX_FILE, WEIGHTS_FILE
from nemotron_h.config.keys import CONFIG_FILE, read_object
from nemotron_h.errors import CheckpointError

DEFAULT_REVISION = "main"
WORD = r"\w+(?:[.-]\w+)*"
NAME = re.compile(rf"({WORD}/{WORD})(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII)
LONGEST = 96  # letters of an organisation, and of a model's name
COMMIT = re.compile(r"[0-9a-f]{40}")


class Watcher(Protocol):
    """Who is told how a download goes."""

    def say(self, line: str) -> None:
        """One line that stays."""

    def fraction(self, done: float, note: str = "") -> None:
        """How much is done, 0 to 1, and a few words beside it. Called from several threads, one at a time."""


@dataclass(frozen=True)
class HubName:
    """A model on the Hub. revision: a branch, a tag or a commit."""

    repository: str
    revision: str = DEFAULT_REVISION

    @classmethod
    def read(cls, text: str) -> Self | None:
        """`org/name[@revision]`; None where text is no such name."""
        match = NAME.fullmatch(text)
        if match is None or max(map(len, match[1].split("/"))) > LONGEST or match[1].endswith(".git"):
            return None
        return cls(match[1], match[2] or DEFAULT_REVISION)

    def __str__(self) -> str:
        return self.repository if self.revision == DEFAULT_REVISION else f"{self.repository}@{self.revision}"


@dataclass(frozen=True)
class Held:
    """A commit of a model in the cache. missing: the files without which it is no whole checkpoint."""

    name: HubName
    commit: str
    folder: Path
    size_bytes: int
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Cache:
    """What the cache holds. unreadable: how many of its folders are damaged."""

    held: tuple[Held, ...]
    unreadable: int


def find(path: str | Path, *, weights: bool = True) -> Path | HubName:
    """The path itself where it exists, else the folder of `org/name[@revision]` in the cache, else the name, which
    would have to be downloaded: nobody is asked. weights: False where config and tokenizer are enough.

    Raises: CheckpointError where it is none of them.
    """
    local = Path(path)
    if local.exists():
        return local
    lacking = f"{path}: must be a checkpoint folder; got no such folder"
    name = HubName.read(path) if isinstance(path, str) else None
    if name is None:
        almost = isinstance(path, str) and not path.startswith((".", "/", "~")) and path.count("/") == 1
        raise CheckpointError(
            f"{lacking}, and no name on the Hub (org/name or org/name@revision)" if almost else lacking
        )
    folder = cached(name, weights=weights)
    if folder is not None:
        return folder
    owner = name.repository.partition("/")[0]
    if Path(owner).is_dir():
        raise CheckpointError(f"{lacking} in {owner}; if it is a name on the Hub, nemotron-h pull {name} downloads it")
    return name


def cached(name: HubName, *, weights: bool = True) -> Path | None:
    """The folder of a name in the cache, where it is whole."""
    config = huggingface_hub.try_to_load_from_cache(
        name.repository, CONFIG_FILE, cache_dir=cache_folder(), revision=name.revision
    )
    if not isinstance(config, str):  # not there, or known not to be
        return None
    folder = Path(config).parent
    return None if missing(folder, weights=weights) else folder


def missing(folder: Path, *, weights: bool = True) -> tuple[str, ...]:
    """Files without which a folder is no whole checkpoint: config.json, and the weights that its index names."""
    needed = {CONFIG_FILE, WEIGHTS_FILE} if weights else {CONFIG_FILE}
    if weights and (folder / INDEX_FILE).exists():
        needed = {CONFIG_FILE, *_shards(folder / INDEX_FILE)}
    return tuple(sorted(name for name in needed if not _is_file(folder / name)))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file system takes
        return False


def _shards(index: Path) -> set[str]:
    """The files that an index names; none where it is damaged: whoever loads it says how."""
    try:
        files = read_object(index).get("weight_map")
    except CheckpointError:
        return set()
    return {str(name) for name in files.values()} if isinstance(files, dict) else set()


def cache_folder() -> Path:
    """The cache that all programs share."""
    return Path(constants.HF_HUB_CACHE).expanduser()


def read_cache() -> Cache:
    """Every commit of every model in the cache that has a config.json, by name.

    Raises: CheckpointError where the cache is no folder.
    """
    try:
        cache = huggingface_hub.scan_cache_dir(cache_folder())
    except huggingface_hub.CacheNotFound:
        return Cache((), 0)
    except ValueError:
        raise CheckpointError(
            f"{cache_folder()}: must be the folder of the cache; got a file; mend HF_HOME or HF_HUB_CACHE"
        ) from None
    found = []
    for model in cache.repos:
        if model.repo_type != "model":
            continue
        blobs = model.repo_path / "blobs"
        partial = sum(file.size_on_disk for file in cache.incomplete_files if file.file_path.parent == blobs)
        for commit in model.revisions:
            lacks = missing(commit.snapshot_path)
            if CONFIG_FILE in lacks:
                continue
            revision = min(commit.refs, key=lambda ref: (ref != DEFAULT_REVISION, ref), default=commit.commit_hash)
            size = commit.size_on_disk + (partial if lacks else 0)
            found.append(Held(HubName(model.repo_id, revision), commit.commit_hash, commit.snapshot_path, size, lacks))
    return Cache(tuple(sorted(found, key=lambda each: (str(each.name), each.commit))), len(cache.warnings))
