"""A download against a Hub on this machine: what is fetched, what is said, and every way it can fail."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from nemotron_h.checkpoint import download as downloads
from nemotron_h.checkpoint.download import STREAMS, download
from nemotron_h.checkpoint.hub import HubName, cache_folder, cached
from nemotron_h.checkpoint.listing import WANTED
from nemotron_h.checkpoint.save import save
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.errors import CapacityError, CheckpointError
from nemotron_h.text.bpe import train
from tests.checkpoint.stub_hub import COMMIT, ENDLESS, SERVER_WORDS, Model, StubHub, connected, sha256, sibling
from tests.full_disk import full_disk

NAME = HubName("org/model")
LARGE = bytes(range(256)) * 1024  # 256 KiB
FILES = {"config.json": b'{"a": 1}', "README.md": b"# A model\n", "model.safetensors": LARGE}


class Told:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.fractions: list[float] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def fraction(self, done: float, note: str = "") -> None:
        self.fractions.append(done)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    monkeypatch.setattr(downloads, "REST_SECONDS", 0.01)
    with connected(tmp_path / "home", monkeypatch) as stub:
        stub.models[NAME.repository] = Model(FILES)
        yield stub


def refusal(kind: type[Exception] = CheckpointError, name: HubName = NAME) -> str:
    """The one line of a download that fails; nothing half done is taken for whole."""
    with pytest.raises(kind) as refused:
        download(name, Told())
    assert cached(name) is None
    line = str(refused.value)
    assert "\n" not in line
    assert SERVER_WORDS not in line
    return line


def blobs() -> Path:
    return cache_folder() / "models--org--model" / "blobs"


def test_what_we_save_is_what_we_fetch(hub: StubHub, tmp_path: Path, build: Any, config: ModelConfig) -> None:
    folder = tmp_path / "saved"
    tokenizer = train(["a b c d"], TokenizerConfig(vocab_size=272))
    save(build(replace(config, vocab_size=272)), folder, tokenizer=tokenizer, shard_bytes=40_000)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "model.safetensors.index.json" in written
    hub.models[NAME.repository].files = written
    got = download(NAME, Told())
    assert {path.name: path.read_bytes() for path in got.iterdir()} == written


def test_only_what_we_read_is_fetched(hub: StubHub) -> None:
    ours = dict.fromkeys(
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "hf_quant_config.json", "LICENSE", "LICENSE.md", "NOTICE.txt", "README.md", "model.safetensors"], b"x",
    )  # fmt: skip
    others = dict.fromkeys(
        ["pytorch_model.bin", "model.pt", "a.png", "original/model.safetensors", "model.nemo", "modeling.py",
         "consolidated.safetensors", "adapter_model.safetensors", ".gitattributes", "../model.safetensors",
         "../../../model.safetensors", "/model.safetensors", "model/../../x.safetensors", "model\\x.safetensors",
         "model\x1b.safetensors", "README.md\n"], b"x",
    )  # fmt: skip
    hub.models[NAME.repository].files = {**ours, **others}
    before = set(cache_folder().parent.rglob("*"))
    folder = download(NAME, Told())
    assert {path.name for path in folder.iterdir()} == set(ours)
    written = {path for path in cache_folder().parent.parent.rglob("*") if path.is_file() or path.is_symlink()}
    assert all(path.is_relative_to(cache_folder() / "models--org--model") for path in written - before)
    assert not any(WANTED.fullmatch(name) for name in others)


def test_it_says_what_it_does_before_it_does_it(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**30))
    hub.models[NAME.repository].card = {"license": "other", "license_name": "open", "license_link": "https://x/y"}
    told = Told()
    folder = download(NAME, told)
    assert told.lines == [
        f"asking {hub.endpoint} for org/model",
        f"org/model is commit {COMMIT[:12]}; licence: open https://x/y",
        "3 of 3 files to fetch, 256 KiB; free disk: 3.00 GiB",
        f"into {folder}",
    ]
    assert told.fractions == sorted(told.fractions)
    assert told.fractions[-1] == 1.0
    again = Told()
    assert download(NAME, again) == folder
    assert again.lines[2:] == [f"all 3 files are in {folder}"]
    assert again.fractions == []


def test_without_a_watcher_lines_go_to_stderr(hub: StubHub, capsys: pytest.CaptureFixture[str]) -> None:
    download(NAME)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"hub        asking {hub.endpoint} for org/model\n" in err
    assert re.search(r"^hub        100 %  256 KiB of 256 KiB  .*/s$", err, re.MULTILINE)
    assert len(err.splitlines()) <= 4 + 10


def test_a_broken_connection_is_taken_up_at_its_byte(hub: StubHub) -> None:
    hub.drop_after, hub.drops = 1 << 16, 3
    folder = download(NAME, told := Told())
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert hub.sent_bytes("model.safetensors") == len(LARGE)
    assert [request.first_byte for request in hub.asked("model.safetensors")] == [0, 1 << 16, 1 << 17, 3 << 16]
    assert told.fractions[-1] == 1.0


def test_a_connection_that_gives_nothing_more_is_given_up(hub: StubHub) -> None:
    hub.drop_after, hub.drops = 0, 1000
    assert "cannot be reached" in refusal()
    large = [request for request in hub.requests if "/cdn/" in request.path]
    assert len(large) == downloads.GOES


KILLED = """
from nemotron_h.checkpoint.download import download
from nemotron_h.checkpoint.hub import HubName
download(HubName("org/model"))
"""


def test_a_killed_download_goes_on_where_it_was(hub: StubHub) -> None:
    hub.drop_after = 1 << 17
    hub.waits.clear()
    partial, folder = blobs() / f"{sha256(LARGE)}.incomplete", blobs().with_name("snapshots") / COMMIT
    with subprocess.Popen([sys.executable, "-c", KILLED], stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: partial.exists() and partial.stat().st_size == 1 << 17)
            until(lambda: len(list(folder.iterdir())) == 2)  # the small ones are there
            with pytest.raises(CheckpointError, match=r"once at a time; another process fetches model\.safetensors"):
                download(NAME, Told())
        finally:
            process.kill()
    hub.waits.set()
    assert cached(NAME) is None
    hub.drop_after = None
    before = hub.sent_bytes("model.safetensors")
    told = Told()
    assert download(NAME, told) == folder
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert hub.asked("model.safetensors")[-1].first_byte == 1 << 17
    assert hub.sent_bytes("model.safetensors") - before == len(LARGE) - (1 << 17)
    assert told.lines[2].startswith("1 of 3 files to fetch, 128 KiB")


def until(true: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_interrupt_ends_all_streams(hub: StubHub) -> None:
    class Impatient(Told):
        def fraction(self, done: float, note: str = "") -> None:
            time.sleep(0.002)  # a slow line, so that there is something to leave out
            if done > 0.05 and not self.fractions:
                self.fractions.append(done)
                os.kill(os.getpid(), signal.SIGINT)

    many = {f"model-{number}.safetensors": bytes([number]) + LARGE * 32 for number in range(STREAMS)}
    hub.models[NAME.repository].files = {"config.json": b"{}", **many}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            download(NAME, Impatient())
    finally:
        signal.signal(signal.SIGINT, before)
    assert sum(path.stat().st_size for path in blobs().iterdir()) < sum(map(len, many.values())) / 2


def test_a_server_without_ranges_gives_all_of_it(hub: StubHub) -> None:
    hub.ignores_ranges = True
    hub.drop_after, hub.drops = 1 << 16, 1
    folder = download(NAME, told := Told())
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert told.fractions[-1] == 1.0


def test_a_server_without_end_is_left(hub: StubHub) -> None:
    hub.endless = True
    assert "model.safetensors must be 262,144 bytes" in refusal()
    assert hub.sent_bytes("model.safetensors") < ENDLESS


@pytest.mark.parametrize("left", [b"other bytes", LARGE + b"more"])
def test_what_is_left_of_something_else_is_not_kept(hub: StubHub, left: bytes) -> None:
    blobs().mkdir(parents=True)
    partial = blobs() / f"{sha256(LARGE)}.incomplete"
    partial.write_bytes(left)
    if len(left) < len(LARGE):
        assert f"model.safetensors must be 262,144 bytes of digest {sha256(LARGE)}" in refusal()
        assert not partial.exists()
    assert (download(NAME, Told()) / "model.safetensors").read_bytes() == LARGE


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1] + b"?", lambda data: data[:-1], lambda data: data + b"?"])
def test_other_bytes_than_promised_are_refused(hub: StubHub, file: str, damage: Any) -> None:
    model = hub.models[NAME.repository]
    model.listed[file] = sibling(file, model.files[file])
    model.files = {**FILES, file: damage(FILES[file])}
    line = refusal()
    assert line.startswith(f"org/model: {file} must be {len(FILES[file]):,} bytes of digest ")
    assert line.endswith("gave others, which are removed; the same command fetches it again")
    model.files = FILES
    assert (download(NAME, Told()) / file).read_bytes() == FILES[file]


def test_the_hub_learns_no_more_than_it_must(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    download(NAME, Told())
    assert {request.agent for request in hub.requests} == {"nemotron-h"}
    [described] = [request.path for request in hub.requests if request.path.startswith("/api/")]
    assert described == "/api/models/org/model/revision/main"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    download(NAME, Told())
    assert hub.requests[-1].token is None


def test_a_model_without_weights_is_no_checkpoint(hub: StubHub) -> None:
    hub.models[NAME.repository].files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    assert "must hold model.safetensors to be a checkpoint" in refusal()
    assert download(NAME, Told(), weights=False) == cached(NAME, weights=False)


def test_a_name_in_an_index_does_not_steer_the_terminal(hub: StubHub) -> None:
    index = b'{"weight_map": {"a": "\\u001b[2J"}}'
    hub.models[NAME.repository].files = {"config.json": b"{}", "model.safetensors.index.json": index}
    assert r"must hold '\x1b[2J' to be a checkpoint" in refusal()


def test_without_weights(hub: StubHub) -> None:
    folder = download(NAME, told := Told(), weights=False)
    assert told.lines[2].startswith("2 of 2 files to fetch, ")
    assert download(NAME, told := Told(), weights=False) == folder
    assert told.lines[2] == f"all 2 files are in {folder}"
    assert {path.name for path in folder.iterdir()} == {"config.json", "README.md"}
    assert hub.asked("model.safetensors") == []
    assert download(NAME, Told()) == folder
    assert (folder / "model.safetensors").read_bytes() == LARGE


def test_the_same_bytes_under_two_names_are_fetched_once(hub: StubHub) -> None:
    hub.models[NAME.repository].files = {**FILES, "LICENSE": b"same", "LICENSE.md": b"same", "NOTICE": b""}
    folder = download(NAME, Told())
    assert (folder / "LICENSE").read_bytes() == (folder / "LICENSE.md").read_bytes() == b"same"
    assert (folder / "NOTICE").read_bytes() == b""
    assert len([request for request in hub.requests if "LICENSE" in request.path]) == 1


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    hub: StubHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    line = refusal(CapacityError)
    need = sum(map(len, FILES.values()))
    assert f"needs {need:,} bytes of disk" in line
    assert "1,000 are free" in line
    assert not cache_folder().exists()


def test_a_disk_that_fills_up_is_one_line_and_the_rest_is_fetched_later(hub: StubHub) -> None:
    with full_disk(100_000):
        line = refusal(CapacityError)
    assert re.search(
        r"could not be written: File too large; model.safetensors needs 162,144 bytes more and [\d,]+ are", line
    )
    before = hub.sent_bytes("model.safetensors")
    download(NAME, Told())
    assert hub.asked("model.safetensors")[-1].first_byte == 100_000
    assert hub.sent_bytes("model.safetensors") - before == len(LARGE) - 100_000


def test_a_gated_model(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.models[NAME.repository].gated = True
    where = f"accept its licence at {hub.endpoint}/org/model, then set HF_TOKEN or run `hf auth login`"
    assert refusal() == f"org/model: is gated; got no token; {where}"
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    assert refusal() == f"org/model: is gated; got a token that has not been let in; {where}"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert refusal() == f"org/model: is gated; got no token; {where}"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    download(NAME, Told())


def test_the_token_stays_with_the_hub(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    download(NAME, Told())
    tokens = {(request.host.partition(":")[0], request.token) for request in hub.requests}
    assert tokens == {("127.0.0.1", f"Bearer {hub.token}"), ("localhost", None)}


def test_offline_the_cache_alone_answers(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal().startswith("org/model: must be in the cache while HF_HUB_OFFLINE is set; ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = download(NAME, Told())
    count = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(NAME, Told()) == folder
    assert len(hub.requests) == count


def test_a_branch_that_moved_is_followed(hub: StubHub) -> None:
    first = download(NAME, Told())
    hub.models[NAME.repository] = Model({**FILES, "README.md": b"new"}, commit="f" * 40)
    assert cached(NAME) == first
    second = download(NAME, Told())
    assert second.name == "f" * 40
    assert cached(NAME) == second
    assert len(hub.asked("model.safetensors")) == 1
