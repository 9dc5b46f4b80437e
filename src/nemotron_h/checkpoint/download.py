"""Download a checkpoint from the Hub into the shared cache: only the files we read, each verified, each resumed.

The Hub's listing gives every file's digest, which is also its name in the cache: sha256 for large files, git's sha1 of
a blob for small ones. Bytes are appended to `blobs/DIGEST.incomplete`, which takes its name when the digest is right;
a killed download goes on at the byte where it was. The branch or tag is written last: what it names is whole.
"""

import fcntl
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from os import SEEK_END
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO

from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name

from nemotron_h.checkpoint.files import write_text, writing
from nemotron_h.checkpoint.hub import HubName, Watcher, cache_folder, cached, find, missing
from nemotron_h.checkpoint.listing import HTTPError, HubFile, Listing, asking, read_listing, request_headers
from nemotron_h.config.keys import shown
from nemotron_h.errors import CapacityError, CheckpointError
from nemotron_h.files import flush, flush_path
from nemotron_h.report.units import format_bytes

STREAMS = 4  # files at a time
GOES = 5  # at a file without one more byte, before the connection is given up
REST_SECONDS = 1.0  # between two of them
TENTHS = 10  # of a download, each said once where there is no bar


class Lines:
    """Who is told where nobody else is: lines on stderr, one a tenth of the download."""

    def __init__(self) -> None:
        self.tenth = 0

    def say(self, line: str) -> None:
        sys.stderr.write(f"{'hub':<10} {line}\n")

    def fraction(self, done: float, note: str = "") -> None:
        if int(done * TENTHS) > self.tenth:
            self.tenth = int(done * TENTHS)
            self.say(f"{self.tenth * 100 // TENTHS:>3} %  {note}")


def resolve(path: str | Path, watch: Watcher | None = None, *, weights: bool = True) -> Path:
    """Where a path or a name of the Hub lies, downloaded where it is nowhere else. Arguments and errors: those of
    `find` and `download`."""
    found = find(path, weights=weights)
    return found if isinstance(found, Path) else download(found, watch, weights=weights)


def download(name: HubName, watch: Watcher | None = None, *, weights: bool = True) -> Path:
    """Ask the Hub what the name stands for, and fetch what the cache lacks of it. Returns: the folder.

    watch: told of it; None: lines on stderr. weights: False leaves them. By HF_HUB_OFFLINE the cache alone answers.
    Raises: CheckpointError where the Hub gives nothing, or not what it promised; CapacityError where the disk is full.
    """
    if constants.is_offline_mode():
        if (held := cached(name, weights=weights)) is not None:
            return held
        raise CheckpointError(
            f"{name}: must be in the cache while HF_HUB_OFFLINE is set; {cache_folder()} does not hold all of it; "
            "unset it to download"
        )
    watch = Lines() if watch is None else watch
    watch.say(f"asking {constants.ENDPOINT} for {name}")
    listing = read_listing(name)
    store = cache_folder() / repo_folder_name(repo_id=name.repository, repo_type="model")
    blobs, folder = store / "blobs", store / "snapshots" / listing.commit
    files = [file for file in listing.files if weights or not file.name.endswith(".safetensors")]
    wanted = [file for file in files if not (folder / file.name).exists()]
    announce(name, listing, files, blobs, folder, watch)
    with writing(store):
        blobs.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
    fetch_all(name, listing.commit, wanted, blobs, folder, watch)
    if lacking := missing(folder, weights=weights):
        raise CheckpointError(
            f"{name}: must hold {shown(lacking[0])} to be a checkpoint; "
            f"{constants.ENDPOINT} has none at {listing.commit}"
        )
    if name.revision != listing.commit:
        reference = store / "refs" / name.revision
        with writing(reference):
            reference.parent.mkdir(parents=True, exist_ok=True)
        write_text(reference, listing.commit)
    return folder


def announce(
    name: HubName, listing: Listing, files: Sequence[HubFile], blobs: Path, folder: Path, watch: Watcher
) -> None:
    """Say what will be fetched, before it is. Raises: CapacityError where it does not fit."""
    lacking = [file for file in files if not (folder / file.name).exists() and not (blobs / file.digest).exists()]
    left_bytes = sum(file.size_bytes - begun_bytes(file, blobs) for file in lacking)
    free_bytes = free(folder)
    watch.say(f"{name} is commit {listing.commit[:12]}; licence: {listing.licence}")
    if not lacking:
        watch.say(f"all {len(files)} files are in {folder}")
        return
    watch.say(
        f"{len(lacking)} of {len(files)} files to fetch, {format_bytes(left_bytes)}; "
        f"free disk: {format_bytes(free_bytes)}"
    )
    watch.say(f"into {folder}")
    if left_bytes > free_bytes:
        raise CapacityError(
            f"{name}: needs {left_bytes:,} bytes of disk for {folder}; {free_bytes:,} are free; "
            "free some, or move the cache with HF_HOME"
        )


def begun_bytes(file: HubFile, blobs: Path) -> int:
    """How much of a file an earlier download left."""
    path = incomplete(file, blobs)
    size = path.stat().st_size if path.exists() else 0
    return size if size <= file.size_bytes else 0  # more than all of it is something else


def incomplete(file: HubFile, blobs: Path) -> Path:
    return blobs / f"{file.digest}.incomplete"


def free(folder: Path) -> int:
    """Bytes free where a folder is or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def fetch_all(name: HubName, commit: str, files: list[HubFile], blobs: Path, folder: Path, watch: Watcher) -> None:
    """Fetch and link files, several at a time; the first failure stops the others where they are."""
    by_digest = {file.digest: file for file in files}  # two names may have the same bytes
    lacking = [file for file in by_digest.values() if not (blobs / file.digest).exists()]
    meter = Meter(sum(file.size_bytes - begun_bytes(file, blobs) for file in lacking), watch)
    with ThreadPoolExecutor(STREAMS) as pool:
        tasks = [pool.submit(fetch, name, commit, file, blobs, meter) for file in by_digest.values()]
        try:
            for task in as_completed(tasks):
                digest = task.result()
                with writing(folder):
                    for file in files:
                        if file.digest == digest:
                            link(folder / file.name, digest)
        except BaseException:  # an interrupt too: else the pool waits for gigabytes
            meter.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def link(path: Path, digest: str) -> None:
    """Name a blob in a snapshot."""
    if not path.exists():
        path.unlink(missing_ok=True)  # a link that leads nowhere
        path.symlink_to(Path("..", "..", "blobs", digest))


class Stopped(Exception):
    """Another file's download failed."""


class Meter:
    """Bytes of all files together, told to a watcher."""

    def __init__(self, total_bytes: int, watch: Watcher) -> None:
        self.total_bytes, self.watch = total_bytes, watch
        self.done_bytes = 0
        self.began, self.lock, self.stopped = time.perf_counter(), Lock(), Event()

    def add(self, count_bytes: int) -> None:
        if self.stopped.is_set():
            raise Stopped
        with self.lock:
            self.done_bytes += count_bytes
            rate = self.done_bytes / (time.perf_counter() - self.began)
            note = f"{format_bytes(self.done_bytes)} of {format_bytes(self.total_bytes)}  {format_bytes(rate)}/s"
            self.watch.fraction(min(1.0, max(0.0, self.done_bytes / self.total_bytes)), note)


def fetch(name: HubName, commit: str, file: HubFile, blobs: Path, meter: Meter) -> str:
    """Bring one file's bytes into the cache, from where an earlier download stopped. Returns: its digest."""
    blob, begun = blobs / file.digest, incomplete(file, blobs)
    with asking(name), on_disk(file, blobs), begun.open("ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{name}: must be downloaded once at a time; another process fetches {file.name}; wait for it"
            ) from None
        if blob.exists():
            begun.unlink(missing_ok=True)
            return file.digest
        out.truncate(begun_bytes(file, blobs))
        out.seek(0, SEEK_END)
        receive(hf_hub_url(name.repository, file.name, revision=commit), file, out, meter)
        flush(out)
        if not file.is_intact(begun):
            begun.unlink()
            raise CheckpointError(
                f"{name}: {file.name} must be {file.size_bytes:,} bytes of digest {file.digest}; "
                f"{constants.ENDPOINT} gave others, which are removed; the same command fetches it again"
            )
        begun.rename(blob)
        flush_path(blobs)
    return file.digest


def receive(url: str, file: HubFile, out: BinaryIO, meter: Meter) -> None:
    """Append what is missing of a file, over as many connections as it takes."""
    goes = 0
    while (before := out.tell()) < file.size_bytes:
        try:
            receive_once(url, file, out, meter)
            return
        except HfHubHTTPError:
            raise
        except HTTPError:
            goes = 1 if out.tell() > before else goes + 1
            if goes == GOES:
                raise
            if meter.stopped.wait(REST_SECONDS):
                raise Stopped from None


def receive_once(url: str, file: HubFile, out: BinaryIO, meter: Meter) -> None:
    """Append what one connection brings."""
    # identity: the bytes of a range are those of the file
    headers = {**request_headers(), "Accept-Encoding": "identity", "Range": f"bytes={out.tell()}-"}
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # all of it, from its beginning
            meter.add(-out.tell())
            out.truncate(0)
            out.seek(0)
        for piece in response.iter_raw():
            out.write(piece)
            meter.add(len(piece))
            if out.tell() > file.size_bytes:
                return  # a server without end; its digest is none


@contextmanager
def on_disk(file: HubFile, blobs: Path) -> Iterator[None]:
    """Say in one line that the disk does not take a file. Raises: CapacityError."""
    try:
        yield
    except HfHubHTTPError:  # an OSError too, of the network
        raise
    except OSError as error:
        left_bytes = file.size_bytes - begun_bytes(file, blobs)
        raise CapacityError(
            f"{blobs}: could not be written: {error.strerror}; {file.name} needs {left_bytes:,} bytes more and "
            f"{free(blobs):,} are free; free some: the same command goes on from there"
        ) from error
