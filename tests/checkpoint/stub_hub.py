"""A Hub on this machine: what huggingface_hub and we ask of the real one, with its failures, and a record of requests.

GET  /api/models/ORG/NAME/revision/REVISION     the commit, the files with sizes and digests, the card
GET  /ORG/NAME/resolve/COMMIT/FILE              a small file; a large one by way of another host, as a CDN is
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 1 << 14
ENDLESS = 1 << 26  # bytes, of what would have no end
SERVER_WORDS = "words of the server"  # which no error of ours repeats


@dataclass
class Model:
    """A repository: its files, and how it answers."""

    files: dict[str, bytes]
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main",)
    card: dict[str, Any] | None = field(default_factory=lambda: {"license": "apache-2.0"})
    gated: bool = False  # files only for those with the token
    listed: dict[str, Any] = field(default_factory=dict)  # told instead of the truth, by file name

    def listing(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "sha": self.commit,
            "cardData": self.card,
            "siblings": [self.listed.get(file, sibling(file, data)) for file, data in self.files.items()],
        }


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", "tokenizer.json"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sibling(name: str, data: bytes) -> dict[str, Any]:
    """A file as the Hub lists it; blobId is what `git hash-object` says of what git stores."""
    stored = data if not is_large(name) else f"oid sha256:{sha256(data)}".encode()
    entry: dict[str, Any] = {
        "rfilename": name,
        "size": len(data),
        "blobId": hashlib.sha1(b"blob %d\0" % len(stored) + stored, usedforsecurity=False).hexdigest(),
    }
    if is_large(name):
        entry["lfs"] = {"size": len(data), "sha256": sha256(data), "pointerSize": 134}
    return entry


@dataclass
class Request:
    path: str
    host: str
    token: str | None
    agent: str | None
    first_byte: int
    sent_bytes: int = 0


class StubHub:
    """Serves models; every request is recorded. endpoint: its address."""

    token = "hf_let_me_in"

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.requests: list[Request] = []
        self.status: int | None = None  # of every answer
        self.described: bytes | None = None  # told of every model instead of the truth
        self.drop_after: int | None = None  # bytes of a large file, after which the connection breaks
        self.drops = 0  # how many connections will
        self.ignores_ranges = False
        self.endless = False
        self.waits = threading.Event()  # cleared: large files stop after drop_after, until it is set, and break
        self.waits.set()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *arguments: Handler(self, *arguments))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def sent_bytes(self, file: str) -> int:
        """Of a file, over all connections."""
        return sum(request.sent_bytes for request in self.requests if request.path.endswith(f"/{file}"))

    def asked(self, file: str) -> list[Request]:
        """Requests for a file that were answered with it."""
        return [request for request in self.requests if request.path.endswith(f"/{file}") and request.sent_bytes]


@contextmanager
def serving() -> Iterator[StubHub]:
    hub = StubHub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.waits.set()
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: StubHub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, format: str, *values: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        begin = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
        request = Request(
            path, self.headers["Host"], self.headers.get("Authorization"), self.headers["User-Agent"], int(begin)
        )
        with self.hub.lock:
            self.hub.requests.append(request)
        parts = path.strip("/").split("/")
        if self.hub.status is not None:
            return self.refuse(self.hub.status)
        if parts[:2] == ["api", "models"]:
            return self.describe("/".join(parts[2:4]), "/".join(parts[5:]))
        self.give(request, "/".join(parts[:2]), "/".join(parts[4:]), parts[2])

    def describe(self, name: str, revision: str) -> None:
        model = self.hub.models.get(name)
        if model is None:
            return self.refuse(401, "RepoNotFound")
        if revision not in (*model.revisions, model.commit):
            return self.refuse(404, "RevisionNotFound")
        told = json.dumps(model.listing(name)).encode() if self.hub.described is None else self.hub.described
        return self.answer(told)

    def give(self, request: Request, name: str, file: str, kind: str) -> None:
        model = self.hub.models[name]
        if kind == "resolve" and model.gated and request.token != f"Bearer {self.hub.token}":
            return self.refuse(401 if request.token is None else 403, "GatedRepo")
        if kind == "resolve" and is_large(file):
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.hub.port}/{name}/cdn/{model.commit}/{file}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data = model.files[file]
        first = 0 if self.hub.ignores_ranges else request.first_byte
        self.send_response(200 if self.hub.ignores_ranges else 206)
        if self.hub.endless:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        with suppress(ConnectionError):  # a reader that had enough
            self.send(request, data[first:], is_large(file))

    def send(self, request: Request, data: bytes, large: bool) -> None:
        for start in range(0, len(data), PIECE):
            if large and self.hub.drop_after is not None and start >= self.hub.drop_after:
                broken = not self.hub.waits.is_set()
                self.hub.waits.wait()
                if broken or self.hub.drops:
                    self.hub.drops -= not broken
                    self.close_connection = True
                    return
            self.wfile.write(data[start : start + PIECE])
            request.sent_bytes += len(data[start : start + PIECE])
        while self.hub.endless and large and request.sent_bytes < ENDLESS:
            self.wfile.write(bytes(PIECE))
            request.sent_bytes += PIECE

    def answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, code: str | None = None) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        body = json.dumps({"error": SERVER_WORDS}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def connected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """A Hub that this process, and those it starts, take for the real one; its cache lies in folder."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(folder))
        # read from the environment when huggingface_hub was imported
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        try:
            yield hub
        finally:
            close_session()  # its connections to this Hub
