"""What a Hub says, and what is made of it: plain facts, or one line of why there are none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from nemotron_h.checkpoint.hub import HubName
from nemotron_h.checkpoint.listing import HubFile, Listing, read_listing
from nemotron_h.errors import CheckpointError
from tests.checkpoint.stub_hub import COMMIT, SERVER_WORDS, Model, StubHub, connected, sha256, sibling

NAME = HubName("org/model")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    with connected(tmp_path / "home", monkeypatch) as stub:
        stub.models[NAME.repository] = Model({"model.safetensors": b"weights", "config.json": b"{}"})
        yield stub


def refusal(name: HubName = NAME) -> str:
    """The one line of an answer that is refused."""
    with pytest.raises(CheckpointError) as refused:
        read_listing(name)
    line = str(refused.value)
    assert "\n" not in line
    assert SERVER_WORDS not in line
    return line


def test_files_come_with_the_digests_that_git_and_sha256_give(hub: StubHub) -> None:
    git_hash_object = "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # of {}
    files = (HubFile("config.json", 2, git_hash_object), HubFile("model.safetensors", 7, sha256(b"weights")))
    assert read_listing(NAME) == Listing(COMMIT, "apache-2.0", files)


def test_bytes_are_intact_or_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for digest in ("9e26dfeeb6e641a33dae4961196235bdb965b21b", sha256(b"{}")):
        for content in (b"{}", b"{]", b"{} ", b""):
            path.write_bytes(content)
            assert HubFile("config.json", 2, digest).is_intact(path) == (content == b"{}")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ({"license": "apache-2.0"}, "apache-2.0"),
        (None, "none stated"),
        ({}, "none stated"),
        ([], "none stated"),
        ({"license": "a\x1b[31m\nb" + "c" * 500}, "a?[31m b" + "c" * 192),
    ],
)
def test_the_licence_is_said_in_plain_letters(hub: StubHub, card: Any, licence: str) -> None:
    hub.models[NAME.repository].card = card
    assert read_listing(NAME).licence == licence


@pytest.mark.parametrize(
    "change",
    [
        {"size": None}, {"size": -1}, {"size": "9"}, {"blobId": None}, {"blobId": "../../x"}, {"blobId": "A" * 40},
        {"lfs": {"size": 8, "sha256": "../" * 20, "pointerSize": 1}},
        {"lfs": {"size": 8, "sha256": "a" * 40, "pointerSize": 1}},
    ],
)  # fmt: skip
def test_a_listing_that_is_not_plain_is_refused(hub: StubHub, change: dict[str, Any]) -> None:
    hub.models[NAME.repository].listed["config.json"] = sibling("config.json", b"{}") | change
    assert refusal() == f"org/model: config.json must be listed with its size and digest; {hub.endpoint} gave others"


@pytest.mark.parametrize(
    "change",
    [{"sha": sha} for sha in ("../../../x", "main", "a" * 39, "A" * 40, 7, None)]
    + [{"siblings": 3}, {"siblings": None}],
)
def test_an_answer_of_something_else_is_refused(
    hub: StubHub, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    answer = hub.models[NAME.repository].listing(NAME.repository) | change
    monkeypatch.setattr(Model, "listing", lambda self, name: answer)
    assert refusal() == (
        f"org/model: must be described by {hub.endpoint} with a commit and files; got another answer; "
        "is HF_ENDPOINT a Hub?"
    )


def test_another_commit_than_the_one_asked_for_is_refused(hub: StubHub) -> None:
    hub.models[NAME.repository].revisions = ("f" * 40,)
    line = refusal(HubName("org/model", "f" * 40))
    assert line == (f"org/model@{'f' * 40}: must be that commit; {hub.endpoint} gave {COMMIT}; is HF_ENDPOINT a Hub?")


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[]", b"3", b"[" * 100_000])
def test_an_answer_that_is_no_object_is_refused(hub: StubHub, answer: bytes) -> None:
    hub.described = answer
    assert "got another answer" in refusal()


def test_what_is_not_there(hub: StubHub) -> None:
    line = refusal(name=HubName("org/nothing"))
    assert line == (
        f"org/nothing: must be a model at {hub.endpoint}; got none of that name, or a private one; "
        "check the name, or set HF_TOKEN"
    )
    line = refusal(name=HubName("org/model", "v9"))
    assert line.startswith("org/model@v9: must be a revision of org/model; got none such; ")


@pytest.mark.parametrize(("status", "advice"), [(500, "try again later"), (403, "check HF_TOKEN")])
def test_a_hub_that_fails(hub: StubHub, status: int, advice: str) -> None:
    hub.status = status
    assert refusal() == f"org/model: must be given by {hub.endpoint}; got HTTP {status}; {advice}"


def test_a_hub_that_is_away(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = refusal()
    assert line.startswith("org/model: must be asked of http://127.0.0.1:9, which cannot be reached (ConnectError); ")


def test_a_token_that_is_none_is_not_sent(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_é")
    assert refusal() == "HF_TOKEN: must be letters of ASCII, as the Hub gives it; got others"
    assert hub.requests == []
