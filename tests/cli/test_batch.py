"""A file of prompts, a file of answers; stopped, it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from nemotron_h.errors import RequestError
from nemotron_h.inference.batch import Output
from nemotron_h.inference.load import load
from nemotron_h.inference.sampling import Sampler

Command = Callable[..., Any]
OPTIONS = ["--max-tokens", 9, "--temperature", 0.9, "--seed", 3, "--ignore-end"]


def prompts_in(folder: Path, *lines: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("at_once", [1, 3])
def test_every_prompt_is_answered_in_order_as_if_alone(
    command: Command, checkpoint: Path, tmp_path: Path, at_once: int
) -> None:
    lines = [{"prompt": "def f"}, {"ids": [5, 9], "max_tokens": 20}, {"prompt": "class"}, {"prompt": "def f"}]
    ended = command("generate", checkpoint, "--batch", prompts_in(tmp_path, *lines), "--at-once", at_once, *OPTIONS)
    assert ended.code == 0, ended.err
    found = answers_in(tmp_path / "prompts.answers.jsonl")
    model = load(checkpoint)
    for line, answer in zip(lines, found, strict=True):
        assert list(answer) == ["ids", "text", "logprobs", "matched", "reused", "cut"]
        if "prompt" in line:
            text = model.generate(line["prompt"], max_tokens=9, temperature=0.9, seed=3, ignore_end=True)
            assert answer["text"] == text
        assert len(answer["ids"]) == len(answer["logprobs"]) == line.get("max_tokens", 9)
        assert max(answer["logprobs"]) <= 0
    assert (found[0]["cut"], found[3]["cut"]) == ("new", "whole")
    assert found[3]["reused"] == len(model.prompt_ids("def f"))
    assert f"4 answers in {tmp_path / 'prompts.answers.jsonl'}; {found[3]['reused']} of" in ended.err


def test_stopped_it_goes_on_to_the_same_answers(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    path = prompts_in(tmp_path, *[{"prompt": f"def {name}"} for name in "abcde"])
    whole, parts = tmp_path / "new" / "whole", tmp_path / "parts"
    assert command("generate", checkpoint, "--batch", path, "--output", whole, *OPTIONS).code == 0
    assert command("generate", checkpoint, "--batch", path, "--output", parts, *OPTIONS).code == 0
    lines = parts.read_text(encoding="utf-8").splitlines(keepends=True)
    parts.write_text("".join(lines[:2]) + lines[2][:20], encoding="utf-8")  # killed in the third
    ended = command("generate", checkpoint, "--batch", path, "--output", parts, *OPTIONS)
    assert "2 of 5 prompts are answered; going on" in ended.err
    assert [one["ids"] for one in answers_in(parts)] == [one["ids"] for one in answers_in(whole)]
    again = command("generate", checkpoint, "--batch", path, "--output", parts, *OPTIONS)
    assert again.code == 0
    assert len(answers_in(parts)) == 5


def test_other_settings_or_prompts_do_not_go_on(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    path = prompts_in(tmp_path, {"prompt": "def f"})
    assert command("generate", checkpoint, "--batch", path, *OPTIONS).code == 0
    line = command("generate", checkpoint, "--batch", path, *OPTIONS[2:]).line
    assert line.endswith(
        "must go on with the settings it was begun with; max_tokens was 9, is 128; name another --output"
    )
    line = command("generate", checkpoint, "--batch", path, *OPTIONS, "--keys-values", "int8").line
    assert "; keys_values was 'as computed', is 'int8'; " in line
    prompts_in(tmp_path, {"prompt": "def g"})
    assert "; prompts was '" in command("generate", checkpoint, "--batch", path, *OPTIONS).line
    (tmp_path / "mine").write_text("precious\n")
    line = command("generate", checkpoint, "--batch", path, "--output", tmp_path / "mine", *OPTIONS).line
    assert line.endswith("mine: must be new, or begun by this command; it is neither; name another --output")
    assert (tmp_path / "mine").read_text() == "precious\n"


def test_an_interrupt_leaves_whole_lines_and_says_how_to_go_on(checkpoint: Path, tmp_path: Path) -> None:
    path = prompts_in(tmp_path, *[{"ids": [number % 300, 7]} for number in range(4000)])
    line = [sys.executable, "-m", "nemotron_h", "generate", str(checkpoint)]
    line += ["--batch", str(path), "--max-tokens", "40", "--ignore-end", "--at-once", "4"]
    answers = tmp_path / "prompts.answers.jsonl"

    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as job:
        until = time.monotonic() + 60
        while not (answers.exists() and answers.stat().st_size > 1000) and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(job.pid, signal.SIGINT)
        _, said = job.communicate(timeout=60)
    assert job.returncode == 130, said
    found = answers_in(answers)
    assert 0 < len(found) < 4000
    assert f"stopped after {len(found):,} of 4,000 answers; the same command goes on" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "prompts.jsonl, line 1: must be JSON; got"),
        ("[1]", "prompts.jsonl, line 1: must be an object; got list"),
        ('{"prompt": "x", "temperature": 1}', "line 1: temperature: unknown; known are prompt, ids and max_tokens"),
        ("{}", "line 1: must have one of prompt and ids; got none"),
        ('{"prompt": "x", "ids": [1]}', "line 1: must have one of prompt and ids; got both"),
        ('{"prompt": 5}', "line 1: prompt: must be text; got int"),
        ('{"ids": []}', "line 1: ids: must be a list of whole numbers, at least one"),
        ('{"ids": [1.5]}', "line 1: ids: must be a list of whole numbers, at least one"),
        ('{"ids": [1], "max_tokens": 0}', "line 1: max_tokens: must be a whole number of 1 or above; got 0"),
        ('{"ids": [320]}', "line 1: ids: must be integers in 0..319; got 320 at place 0"),
    ],
)
def test_lines_that_cannot_be_answered_are_refused_by_number(
    command: Command, checkpoint: Path, tmp_path: Path, line: str, words: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    assert words in command("generate", checkpoint, "--batch", tmp_path / "prompts.jsonl").line
    assert not (tmp_path / "prompts.answers.jsonl").exists()


def test_a_file_of_answers_belongs_to_one_process(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    path = prompts_in(tmp_path, {"prompt": "def f"})
    with closing(Output(tmp_path / "prompts.answers.jsonl", {})):
        line = command("generate", checkpoint, "--batch", path).line
    rule = "must not be in use; another process has it; wait, or name another --output"
    assert line == f"{tmp_path / 'prompts.answers.jsonl'}: {rule}"


def test_lines_are_cut_at_newlines_alone(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    line = '{"prompt": "a\u2028b\x85c"}\r\n'
    (tmp_path / "prompts.jsonl").write_text(f"{line}\n{line}", encoding="utf-8", newline="")
    assert command("generate", checkpoint, "--batch", tmp_path / "prompts.jsonl", "--max-tokens", 1).code == 0
    assert len(answers_in(tmp_path / "prompts.answers.jsonl")) == 2


def test_answers_that_could_not_be_given_are_counted(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time: a text that looks like an error is none."""
    draw = Sampler.draw

    def broken(self: Sampler, logits: Tensor) -> int:
        if self.generated:
            raise RequestError('logits: must be finite; got nan for ", "error": "')
        return draw(self, logits)

    monkeypatch.setattr(Sampler, "draw", broken)
    path = prompts_in(tmp_path, {"prompt": "def f"}, {"prompt": "def g", "max_tokens": 1})
    for _ in range(2):
        ended = command("generate", checkpoint, "--batch", path, "--ignore-end")
        assert ended.code == 1
        assert '1 of them could not be given: "error" says why' in ended.err
    first, second = answers_in(tmp_path / "prompts.answers.jsonl")
    assert first["error"].startswith("logits: must be finite")
    assert "error" not in second


def test_options_that_do_not_go_together(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    path = prompts_in(tmp_path, {"prompt": "x"})
    assert command("generate", checkpoint, "x", "--output", "y").line.startswith("output: needs --batch; got")
    assert command("generate", checkpoint, "x", "--at-once", 2).line.startswith("at_once: needs --batch; got 2")
    assert command("generate", checkpoint, "--batch", path, "--json").line.startswith("json: must not be given with")
    assert "must be given once" in command("generate", checkpoint, "x", "--batch", path).line
    assert command("generate", checkpoint, "--batch", path, "--at-once", 0).line == "at_once: must be 1 or above; got 0"
    line = command("generate", checkpoint, "--batch", tmp_path / "none").line
    assert line.startswith(f"{tmp_path / 'none'}: must be a readable file of UTF-8; got")
