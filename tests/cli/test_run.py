"""`nemotron-h run`: each stage once, whatever happens in between."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.checkpoint.files import claimed
from nemotron_h.cli import stages
from nemotron_h.cli.run import seconds_left
from nemotron_h.cli.watch import Watch
from nemotron_h.config.recipe import STAGES
from nemotron_h.inference.load import load

Command = Callable[..., Any]
SMALL = [
    "tokenizer.vocab_size=300",
    "corpus.validation_fraction=0.2",
    "train.steps=3",
    "train.sequence_length=64",
    "train.batch_size=1",
    "train.checkpoint_every_steps=2",
    "samples.max_tokens=4",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)  # models of millions of weights


@pytest.fixture
def arguments(corpus: Path) -> list[object]:
    return ["run", "laptop", f"corpus.source={corpus}", *SMALL]


def record(stage: str, run: str = "laptop") -> dict[str, Any]:
    return json.loads((Path("runs") / run / "stages" / f"{stage}.json").read_text())  # type: ignore[no-any-return]


def outcome(run: str = "laptop") -> dict[str, Any]:
    """result.json without what a clock says."""
    result = json.loads((Path("runs") / run / "result.json").read_text())
    result["seconds"] = list(result["seconds"])
    return result  # type: ignore[no-any-return]


MOMENTS = [("shards", "after"), ("train", "inside"), ("corpus", "after"), ("tokenizer", "before")]


@pytest.mark.parametrize("kills", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_whole_life(command: Command, process: Command, arguments: list[object], kills: int) -> None:
    ended = command(*arguments)
    assert ended.code == 0, ended.err
    result = outcome()
    assert result["seconds"] == list(STAGES)
    assert 0 < result["bits_per_byte"] < 16
    assert set(result["baselines"]) == {f"byte {n}-gram" for n in range(1, 7)} | {"xz", "xz after the training bytes"}
    assert result["checkpoint"] == "runs/laptop/training/checkpoints/step-00000003"
    assert load(result["checkpoint"]).generate("def ", max_tokens=2, ignore_end=True) is not None
    assert "bits than the best n-gram" in ended.out
    assert "near copies" in ended.out
    assert f"nemotron-h generate {result['checkpoint']}" in ended.out

    # again: all is done
    times = {path: path.stat().st_mtime_ns for path in Path("runs/laptop").rglob("*") if path.name != "result.json"}
    again = command(*arguments)
    assert again.out.count("done before") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in times if path.name not in ("laptop", ".lock")} == {
        path: at for path, at in times.items() if path.name not in ("laptop", ".lock")
    }
    assert outcome() == result

    # killed between stages, inside them, and inside the training: the same end
    for stage, place in sorted(MOMENTS[:kills], key=lambda moment: list(STAGES).index(moment[0])):
        killed = process(*arguments, "--name", "killed", before=KILL.format(stage=stage, place=place))
        assert killed.code == -signal.SIGKILL, killed.err
        assert not (Path("runs/killed/stages") / f"{stage}.json").exists()
    assert command(*arguments, "--name", "killed").code == 0
    assert outcome("killed") == result | {"checkpoint": result["checkpoint"].replace("laptop", "killed")}


KILL = """
import os, signal
import torch
torch.set_num_threads(1)
from nemotron_h.cli import stages
from nemotron_h.training import loop
real, save = stages.STAGES["{stage}"], loop._Run.save
def die(*rest):
    os.kill(os.getpid(), signal.SIGKILL)
def killed(*arguments):
    if "{place}" == "before":
        die()
    if "{place}" == "inside":
        loop._Run.save = lambda self: die() if self.step == 3 else save(self)
    real(*arguments)
    die()
stages.STAGES["{stage}"] = killed
"""


def test_some_of_the_stages(command: Command, arguments: list[object]) -> None:
    assert command(*arguments, "--until", "tokenizer").code == 0
    assert sorted(path.stem for path in Path("runs/laptop/stages").iterdir()) == ["corpus", "tokenizer"]
    assert outcome()["bits_per_byte"] is None
    assert command(*arguments, "--only", "baselines").code == 0
    assert record("baselines")["best_ngram"] == min(
        bits for name, bits in record("baselines")["bits_per_byte"].items() if "gram" in name
    )
    missing = command(*arguments, "--only", "samples").line
    assert "must hold a checkpoint to write samples with" in missing
    assert "shard" in command(*arguments, "--only", "train").line
    assert command(*arguments, "--only", "shardz").line == (
        "stage: must be one of the recipe's; got 'shardz'; did you mean shards?"
    )


def test_fresh_starts_beside(command: Command, arguments: list[object]) -> None:
    for _ in range(2):
        assert command(*arguments, "--until", "corpus", "--fresh").code == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["laptop", "laptop-2"]
    # and goes on by its name
    assert "done before" in command(*arguments, "--until", "corpus", "--name", "laptop-2").out


STOP = """
import os, signal
from nemotron_h.training import loop
real = loop._Run.advance
def advance(self, *rest):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(self, *rest)
loop._Run.advance = advance
"""


def test_a_stopped_run_says_what_to_type(command: Command, process: Command, arguments: list[object]) -> None:
    Path("runs/laptop").mkdir(parents=True)
    stopped = process(*arguments, "--fresh", before=STOP)
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    assert "stopped at step 1 of 3; saved; --name laptop-2 instead of --fresh goes on from there" in stopped.out
    stopped = process(*arguments, "--name", "laptop-2", before=STOP)
    assert "stopped at step 2 of 3; saved; the same command goes on from there" in stopped.out
    assert command(*arguments, "--name", "laptop-2").code == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["laptop", "laptop-2"]


def failing(error: BaseException) -> Callable[..., None]:
    def stage(*_: object) -> None:
        raise error

    return stage


def test_the_seconds_of_a_stage_are_those_of_all_its_goes(
    command: Command, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([20.0, 300.0, 4000.0])
    monkeypatch.setattr(Watch, "seconds", property(lambda watch: next(seconds)))
    for error, code in [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)]:
        with monkeypatch.context() as patched:
            patched.setitem(stages.STAGES, "corpus", failing(error))
            assert command(*arguments, "--until", "corpus").code == code
    assert command(*arguments, "--until", "corpus").code == 0
    assert json.loads(Path("runs/laptop/result.json").read_text())["seconds"] == {"corpus": 4320.0}
    assert [path.name for path in Path("runs/laptop/stages").iterdir()] == ["corpus.json"]


def test_seconds_left_at_the_pace_of_the_finished_stages() -> None:
    limits = {"corpus": 5, "tokenizer": 10, "train": 100, "samples": 0}
    assert seconds_left(limits, {"corpus": 10.0}, ["tokenizer", "train"]) == 220
    assert seconds_left(limits, {"corpus": 10.0, "tokenizer": 5.0, "shards": 70.0}, ["train"]) == 100
    assert seconds_left(limits, {"corpus": 10.0}, []) is None
    assert seconds_left(limits, {"corpus": 10.0}, ["shards", "train"]) is None
    assert seconds_left(limits, {"samples": 10.0}, ["train"]) is None


def test_the_first_stages_tell_how_long_the_run_takes(
    command: Command, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"corpus": 10.0, "tokenizer": 5.0, "train": 2.0, "samples": 2.0}
    monkeypatch.setattr(Watch, "seconds", property(lambda watch: seconds[watch.name]))
    for stage in seconds:
        monkeypatch.setitem(stages.STAGES, stage, lambda *_: {"bits_per_byte": 3.0, "checkpoint": "a"})
    arguments += ['stages=["corpus", "tokenizer", "train", "samples"]']
    arguments += ["limit_seconds={corpus = 5, tokenizer = 10, train = 100, samples = 10}"]

    def left(*options: object) -> list[str]:
        return [line for line in command(*arguments, *options).out.splitlines() if "to go" in line]

    rule = "run        about {} s to go at this machine's pace"
    assert left("--until", "tokenizer") == [rule.format(20)]
    assert left("--only", "corpus") == []
    assert left("--name", "whole") == [rule.format(240), rule.format(110)]  # then training measures itself
    Path("runs/laptop/stages/tokenizer.json").unlink()
    assert left() == [rule.format(110)]  # what was done before says nothing anew


@pytest.mark.parametrize("text", ["", '{"seconds": 1', "[]", "\xff"])
def test_a_damaged_file_of_the_run_is_one_line(command: Command, arguments: list[object], text: str) -> None:
    assert command(*arguments, "--until", "corpus").code == 0
    for path in (Path("runs/laptop/stages/corpus.json"), Path("runs/laptop/recipe.json")):
        path.write_text(text, encoding="latin-1")
        line = command(*arguments, "--until", "corpus").line
        assert line.startswith(f"{path}: must be a JSON object")
        assert line.endswith("; remove it to do again what wrote it")
        path.unlink()
        assert command(*arguments, "--until", "corpus").code == 0
    Path("runs/laptop/stages/corpus.json").write_text("{}")
    assert "must be a JSON object with seconds" in command(*arguments, "--until", "corpus").line


def test_other_settings_are_refused_by_name(command: Command, arguments: list[object]) -> None:
    assert command(*arguments, "--until", "corpus").code == 0
    line = command(*arguments, "train.steps=4", "--until", "corpus").line
    assert line.startswith("train.steps: must stay 3, with which runs/laptop was begun; got 4")
    line = command(*arguments, 'stages=["corpus", "train"]', "--only", "corpus").line
    assert line.startswith("stages: must stay")


def test_one_process_a_run(command: Command, arguments: list[object]) -> None:
    Path("runs/laptop").mkdir(parents=True)
    with claimed(Path("runs/laptop")):
        assert command(*arguments, "--until", "corpus").line.startswith("runs/laptop: must not be in use")
    assert command(*arguments, "--until", "corpus").code == 0


def test_a_limit_that_is_passed_is_said(command: Command, arguments: list[object]) -> None:
    ended = command(*arguments, "--until", "tokenizer", "limit_seconds.corpus=0", "limit_seconds.tokenizer=1000")
    of = {line.split()[0]: line for line in ended.out.splitlines() if line.endswith((" s", "of 0 s"))}
    assert of["corpus"].endswith(", over its limit of 0 s")
    assert "limit" not in of["tokenizer"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["train.stepz=3"], "train.stepz: unknown setting; did you mean steps?"),
        (["trian.steps=3"], "trian: unknown setting; did you mean train?"),
        (["train.steps=many"], "train.steps: must be a valid integer; got 'many'"),
        (["train.steps.more=3"], "train.steps.more: must name a setting in a table"),
        (["model.preset=4mm"], "preset: must be one that exists; got '4mm'"),
        (["samples.temperature=-1"], "samples.temperature: must be 0 or above; got -1"),
        (["samples.max_tokens=0"], "samples.max_tokens: must be 1 or above; got 0"),
        (['stages=["train", "corpus"]'], "stages: must be some of"),
        (['stages=["korpus"]'], "stages: must name known stages; got 'korpus'; did you mean corpus?"),
        (["limit_seconds.train=-5"], "limit_seconds.train: must be 0 or above; got -5"),
        (["limit_seconds.korpus=3"], "limit_seconds: must name known stages; got 'korpus'"),
        (["--name", "a/b"], "name: must be the name of a folder under runs/; got 'a/b'"),
        (["--name", "a\\b"], "name: must be the name of a folder under runs/; got 'a\\\\b'"),
        (["--name", ""], "name: must be the name of a folder under runs/; got ''"),
        (["tokenizer.vocab_size=999999"], "tokenizer.vocab_size: must fit the model's"),
    ],
)
def test_a_recipe_that_is_none_is_one_line(
    command: Command, arguments: list[object], extra: list[str], words: str
) -> None:
    assert command(*arguments, *extra).line.startswith(words)
    assert not Path("runs").exists()


def test_recipe_files(command: Command, arguments: list[object], tmp_path: Path) -> None:
    assert command("run", "laptp").line.startswith("recipe: must be a .toml file or one of the package's; got 'laptp'")
    assert command("run", "none.toml").line == "none.toml: must be a readable file; got No such file or directory"
    Path("bad.toml").write_text("[train\n")
    assert command("run", "bad.toml").line.startswith("bad.toml: must be TOML")
    Path("bad.toml").write_bytes(b"name = '\xff'")
    assert command("run", "bad.toml").line == "bad.toml: must be UTF-8 text; got other bytes"


def test_a_corpus_that_is_none_is_one_line(command: Command, arguments: list[object], tmp_path: Path) -> None:
    line = command(*arguments, f"corpus.source={tmp_path / 'none'}").line
    assert line.startswith(f"{tmp_path / 'none'}: must be a folder")


def test_a_name_is_taken_as_it_stands(command: Command, arguments: list[object]) -> None:
    name = 'it\'s a "name" [1]'
    assert command(*arguments, "--until", "corpus", "--name", name).code == 0
    assert [path.name for path in Path("runs").iterdir()] == [name]
