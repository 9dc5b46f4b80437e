"""Checkpoints of a run: whole, few, and the newest is the one to go on from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemotron_h.checkpoint.load import load
from nemotron_h.checkpoint.resume import TENSORS, VALUES, newest_step, read_step, save_step, step_folder, steps
from nemotron_h.errors import CheckpointError
from nemotron_h.model.hybrid import Hybrid

Build = Callable[..., Hybrid]


def write(folder: Path, step: int, model: Hybrid, keep: int = 2) -> Path:
    master = {f"master.{name}": p for name, p in model.named_parameters()}
    return save_step(
        folder, step, model, master, {"step": step, "place": 7, "settings": {"a": 1}}, tokenizer=None, keep=keep
    )


def test_what_is_written_is_read(build: Build, tmp_path: Path) -> None:
    model = build()
    path = write(tmp_path, 4, model)
    assert path.name == "step-00000004"
    tensors, values = read_step(path)
    assert values == {"step": 4, "place": 7, "settings": {"a": 1}}
    assert all(torch.equal(tensors[f"master.{name}"], p) for name, p in model.named_parameters())
    for name, p in load(path).named_parameters():  # the published format beside it
        assert torch.equal(p, dict(model.named_parameters())[name].to(p.dtype))


def test_the_newest_few_are_kept(build: Build, tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step, build())
    assert [path.name for path in steps(tmp_path)] == ["step-00000002", "step-00000010"]
    newest = newest_step(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000010"


def test_steps_of_nine_digits_are_later(tmp_path: Path) -> None:
    for step in (100_000_000, 99_999_999, 1_000_000_000):
        step_folder(tmp_path, step).mkdir()
    assert steps(tmp_path) == [step_folder(tmp_path, step) for step in (99_999_999, 100_000_000, 1_000_000_000)]


def test_leftovers_are_cleaned_and_never_the_newest(build: Build, tmp_path: Path) -> None:
    write(tmp_path, 1, build())
    (tmp_path / ".step-00000002.partial").mkdir()
    (tmp_path / "step-3").mkdir()
    newest = newest_step(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000001"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-3"]
    assert newest_step(tmp_path / "none") is None


def test_damage_is_named(build: Build, tmp_path: Path) -> None:
    path = write(tmp_path, 1, build())
    (path / VALUES).write_text('{"step": 1}')
    with pytest.raises(CheckpointError, match=rf"{VALUES}: must hold step, place, settings; got step"):
        read_step(path)
    (path / VALUES).write_text('{"step"')
    with pytest.raises(CheckpointError, match=rf"{VALUES}: must be readable JSON"):
        read_step(path)
    (path / TENSORS).write_bytes((path / TENSORS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{TENSORS}: must be a whole safetensors file"):
        read_step(path)
