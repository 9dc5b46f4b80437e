"""`pull`: the folder on stdout and nothing else; every refusal in one line; and PATH where it may be a name."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.checkpoint.load import load
from nemotron_h.cli.pull import folder_of
from tests.checkpoint.stub_hub import COMMIT, Model, StubHub, connected

NAME = "org/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Iterator[StubHub]:
    """A Hub that has the tiny checkpoint."""
    monkeypatch.chdir(tmp_path)
    with connected(tmp_path / "home", monkeypatch) as stub:
        stub.models[NAME] = Model({path.name: path.read_bytes() for path in checkpoint.iterdir()})
        yield stub


def test_stdout_is_the_folder(command: Callable[..., Any], hub: StubHub) -> None:
    ended = command("pull", NAME)
    assert ended.code == 0
    folder = Path(ended.out.removesuffix("\n"))
    assert folder.name == COMMIT
    load(folder)
    assert ended.err.startswith(f"hub        asking {hub.endpoint} for {NAME}\n")
    assert "licence: apache-2.0" in ended.err
    assert "100 %" in ended.err
    assert command("pull", f"{NAME}@main").out == ended.out


def test_in_a_process_of_its_own(process: Callable[..., Any], hub: StubHub) -> None:
    """huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_TOKEN when it is imported."""
    ended = process("pull", NAME)
    assert ended.code == 0
    load(Path(ended.out.removesuffix("\n")))
    hub.models[NAME].gated = True
    shutil.rmtree("home")
    ended = process("pull", NAME)
    assert (ended.code, ended.out) == (2, "")
    *told, line = ended.err.splitlines()
    assert all(each.startswith("hub        ") for each in told)
    assert line.startswith(f"nemotron-h: {NAME}: is gated; got no token; accept its licence at {hub.endpoint}/{NAME}, ")


def test_on_a_terminal_there_is_a_bar(
    command: Callable[..., Any], hub: StubHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    ended = command("pull", NAME)
    assert "\n" not in ended.out.removesuffix("\n")
    assert "━" in ended.err
    assert "hub        asking" in ended.err
    assert "10 %" not in ended.err


@pytest.mark.parametrize("name", ["tiny", "./org/tiny", "org/tiny@", "a/b/c"])
def test_what_is_no_name_is_refused(command: Callable[..., Any], hub: StubHub, name: str) -> None:
    assert command("pull", name).line == f"name: must be org/name or org/name@revision; got {name!r}"
    assert hub.requests == []


def test_a_name_is_asked_for_though_a_folder_has_it(command: Callable[..., Any], hub: StubHub) -> None:
    Path(NAME).mkdir(parents=True)
    assert Path(command("pull", NAME).out.removesuffix("\n")).name == COMMIT


def test_a_path_may_be_a_name(hub: StubHub, checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert folder_of(str(checkpoint)) == checkpoint
    assert hub.requests == []
    small = folder_of(NAME, weights=False)
    assert not (small / "model.safetensors").exists()
    folder = folder_of(NAME)
    assert folder == small
    load(folder)
    count = len(hub.requests)
    assert folder_of(NAME) == folder
    assert len(hub.requests) == count
