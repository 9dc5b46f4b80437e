"""What lies here: checkpoints of the cache and runs, as a table and as JSON."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.checkpoint.hub import cache_folder
from nemotron_h.checkpoint.resume import step_folder
from nemotron_h.training.loop import CHECKPOINTS, METRICS
from tests.checkpoint.stub_hub import COMMIT, Model, StubHub, connected


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    monkeypatch.chdir(tmp_path)
    with connected(tmp_path / "home", monkeypatch) as stub:
        yield stub


def listed(command: Callable[..., Any], *arguments: object) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(command("ls", "--json", *arguments).out)
    return values


def test_nothing_is_no_error(command: Callable[..., Any], hub: StubHub) -> None:
    assert listed(command) == {
        "cache": str(cache_folder()),
        "checkpoints": [],
        "others": {"count": 0, "bytes": 0},
        "unreadable": 0,
        "runs": [],
    }
    ended = command("ls")
    assert ended.code == 0
    assert "no checkpoint of this family" in ended.out
    assert "no runs in runs" in ended.out
    assert hub.requests == []


def test_checkpoints(command: Callable[..., Any], hub: StubHub, checkpoint: Path) -> None:
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    quantised = json.dumps({"producer": {}, "quantization": {"quant_algo": "FP8"}}).encode()
    hub.models["org/tiny"] = Model(files)
    hub.models["org/tiny-fp8"] = Model({**files, "hf_quant_config.json": quantised}, commit="a" * 40)
    hub.models["org/llama"] = Model({"config.json": b'{"model_type": "llama"}', "model.safetensors": b"12345"})
    folders = [Path(command("pull", name).out.strip()) for name in ("org/tiny", "org/tiny-fp8", "org/llama")]
    (folders[1] / "model.safetensors").unlink()
    (folders[2].parents[1] / "refs" / "main").write_text("b" * 40)
    shutil.copytree(folders[2].parents[1], cache_folder() / "models--org--other", symlinks=True)
    (cache_folder() / "models--org--other" / "refs" / "main").unlink()
    values = listed(command)
    first, second = values["checkpoints"]
    assert first == {
        "name": "org/tiny",
        "revision": "main",
        "commit": COMMIT,
        "format": "bfloat16",
        "bytes": sum(map(len, files.values())),
        "missing": [],
        "path": str(folders[0]),
    }
    assert (second["name"], second["format"], second["missing"]) == ("org/tiny-fp8", "FP8", ["model.safetensors"])
    assert values["others"] == {"count": 1, "bytes": 23 + 5}
    assert values["unreadable"] == 1  # its main is no commit that is there
    out = command("ls").out
    assert "main 0123456789ab" in out
    assert "whole" in out
    assert "incomplete" in out
    assert "models of other families there: 1, 28 B" in out
    assert "damaged folders there, not listed: 1" in out


def test_a_config_does_not_steer_the_terminal(command: Callable[..., Any], hub: StubHub, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text()) | {"dtype": "\x1b[31m", "torch_dtype": "\x1b[31m"}
    hub.models["org/odd"] = Model({"config.json": json.dumps(config).encode(), "model.safetensors": b""})
    command("pull", "org/odd")
    assert listed(command)["checkpoints"][0]["format"] is None
    assert "\x1b" not in command("ls").out


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"model_type": ["nemotron_h"]}'])
def test_a_damaged_config_is_no_checkpoint_of_ours(command: Callable[..., Any], hub: StubHub, content: bytes) -> None:
    hub.models["org/odd"] = Model({"config.json": content, "model.safetensors": b""})
    command("pull", "org/odd")
    assert listed(command)["checkpoints"] == []
    assert listed(command)["others"]["count"] == 1


def test_runs(command: Callable[..., Any], hub: StubHub) -> None:
    of_recipe, of_train, begun = (Path("runs") / name for name in ("a", "b", "c"))
    for folder, steps in ((of_recipe / "training" / CHECKPOINTS, (90, 100)), (of_train / CHECKPOINTS, (123_456_789,))):
        for step in steps:
            step_folder(folder, step).mkdir(parents=True)
            (step_folder(folder, step) / "model.safetensors").write_bytes(bytes(1000))
        (folder / ".step-00000200.partial").mkdir()
        (folder / "step-by-step").mkdir()
        (folder.parent / METRICS).write_bytes(bytes(7))
    begun.mkdir()
    rows = [tuple(row.values()) for row in listed(command)["runs"]]
    assert rows == [
        ("a", 100, 2007, str(of_recipe / "training" / CHECKPOINTS / "step-00000100")),
        ("b", 123_456_789, 1007, str(of_train / CHECKPOINTS / "step-123456789")),
        ("c", None, 0, None),
    ]
    out = command("ls").out
    assert "1.96 KiB" in out
    Path("runs").rename("elsewhere")
    assert [row["name"] for row in listed(command, "--runs", "elsewhere")["runs"]] == ["a", "b", "c"]


def test_a_run_that_goes_on_meanwhile(
    command: Callable[..., Any], hub: StubHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the run removes between the listing and the look at its size."""
    Path("runs/a").mkdir(parents=True)
    for name in ("kept", "removed"):
        (Path("runs/a") / name).write_bytes(bytes(7))
    lstat = Path.lstat

    def late(path: Path) -> Any:
        if path.name == "removed":
            path.unlink(missing_ok=True)
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", late)
    assert [row["bytes"] for row in listed(command)["runs"]] == [7]
