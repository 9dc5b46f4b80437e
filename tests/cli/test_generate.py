"""Text and ids out of a checkpoint."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.checkpoint.load import load as load_model
from nemotron_h.checkpoint.save import save
from nemotron_h.config.sampling import Sampling
from nemotron_h.inference.load import LanguageModel, load

Command = Callable[..., Any]


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "m"))


def test_ids_without_a_tokenizer(process: Callable[..., Any], folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    options = "--ids 5,9,13 --max-tokens 16 --temperature 0 --precision float32 --ignore-end --json"
    ended = process("generate", folder, *options.split())
    assert ended.code == 0, ended.err
    ids = json.loads(ended.out)["ids"]
    assert len(ids) == 16
    assert ids == list(load(folder, precision="float32").tokens([5, 9, 13], max_tokens=16, ignore_end=True))


def test_a_reader_that_leaves_ends_the_stream(checkpoint: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["generate", str(checkpoint), "x", "--max-tokens", "1000000", "--temperature", "1", "--ignore-end"]
    line = [sys.executable, "-m", "nemotron_h", *arguments]
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 1
    assert "rror" not in done.stderr


def test_text_as_it_comes_and_as_json(command: Command, folder: Path, tmp_path: Path) -> None:
    options = ["--max-tokens", 30, "--temperature", 0.8, "--seed", 5, "--ignore-end"]
    text = load(folder).generate("def f", max_tokens=30, temperature=0.8, seed=5, ignore_end=True)
    assert text
    assert command("generate", folder, "def f", *options).out == text + "\n"
    assert json.loads(command("generate", folder, "def f", "--json", *options).out) == {"text": text}
    (tmp_path / "prompt").write_text("def f")
    assert command("generate", folder, "--prompt-file", tmp_path / "prompt", *options).out == text + "\n"
    stop = text[10:13]
    for extra in ([], ["--json"]):
        ended = command("generate", folder, "def f", "--stop", stop, *extra, *options)
        cut = text[: text.index(stop)]
        assert ended.out == (json.dumps({"text": cut}) + "\n" if extra else cut + "\n")


def test_the_checkpoints_defaults_are_taken_where_no_option_is_given(command: Command, folder: Path) -> None:
    drawn = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(drawn))
    language, tail = load(folder), ["--max-tokens", 20, "--seed", 5, "--ignore-end", "--json"]

    def text(**options: Any) -> dict[str, str]:
        sampling = Sampling(seed=5, **options)
        pieces = language.stream("def f", max_tokens=20, sampling=sampling, ignore_end=True)
        return {"text": "".join(pieces)}

    by_default = text(temperature=0.9, top_k=20, top_p=0.9)
    assert json.loads(command("generate", folder, "def f", *tail).out) == by_default
    assert by_default["text"] == language.generate("def f", max_tokens=20, seed=5, ignore_end=True)
    others = [text(temperature=0.9, top_k=3, top_p=0.9), text(), text(temperature=0.9)]
    assert by_default not in others
    assert json.loads(command("generate", folder, "def f", "--top-k", 3, *tail).out) == others[0]
    assert json.loads(command("generate", folder, "def f", "--temperature", 0, *tail).out) == others[1]
    assert json.loads(command("generate", folder, "def f", "--ignore-defaults", *tail).out) == others[1]
    own = ["--ignore-defaults", "--temperature", 0.9]
    assert json.loads(command("generate", folder, "def f", *own, *tail).out) == others[2]


def test_a_default_that_cannot_be_honoured_tells_what_to_do(command: Command, folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"no_repeat_ngram_size": 3}')
    assert command("generate", folder, "x").line == (
        "generation_config.json: no_repeat_ngram_size is not supported; got 3; draw without the checkpoint's defaults: "
        "--ignore-defaults, or sampling=Sampling(...)"
    )
    assert command("generate", folder, "x", "--ignore-defaults", "--max-tokens", 2).code == 0


def test_ids_as_a_line(command: Command, folder: Path) -> None:
    ended = command("generate", folder, "--ids", "5", "--max-tokens", 3, "--ignore-end")
    assert len([int(part) for part in ended.out.split(",")]) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["x", "--temperature", "-1"], "temperature: must be 0 or above; got -1.0"),
        (["x", "--top-p", "0"], "top_p: must lie above 0"),
        (["x", "--top-k", "-3"], "top_k: must be 0 (all) or above; got -3"),
        (["x", "--seed", "-3"], "seed: must lie in"),
        (["x", "--max-tokens", "0"], "max_tokens: must be 1 or above; got 0"),
        (["x", "--stop", ""], "stop: must not hold an empty string"),
        (["x", "--precision", "int3"], "precision: must be one of auto, bfloat16, float32, int8, int4; got 'int3'"),
        ([], "prompt: must be given once, as PROMPT, --prompt-file, --ids, --batch; got none"),
        (
            ["x", "--ids", "5"],
            "prompt: must be given once, as PROMPT, --prompt-file, --ids, --batch; got PROMPT and --ids",
        ),
        (["--ids", "5,x"], "ids: must be whole numbers"),
        (["--ids", ""], "ids: must be whole numbers"),
        (["--ids", "5,320"], "ids: must be integers in 0..319; got 320 at place 1"),
        (["--ids", "5", "--stop", "x"], "stop: needs a text prompt"),
    ],
)
def test_what_cannot_be_honoured_is_one_line(
    command: Command, checkpoint: Path, options: list[str], words: str
) -> None:
    ended = command("generate", checkpoint, *options)
    assert ended.line.startswith(words)
    assert ended.out == ""


@pytest.mark.parametrize("options", [["--max-tokens", "0"], ["--stop", ""], ["--precision", "int3"]])
def test_options_are_checked_before_the_model_is_read(command: Command, options: list[str]) -> None:
    assert command("generate", "no-such-folder", "x", *options).line.startswith(f"{options[0][2:].replace('-', '_')}: ")


def test_drafts_and_keys_in_int8(command: Command, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Drafts change nothing, and what they did is said; keys and values that are rounded may."""
    caplog.set_level("INFO")
    asked = ("generate", folder, "def", "--max-tokens", 60, "--ignore-end")
    texts = {drafts: command(*asked, "--drafts", drafts).out for drafts in ("auto", "off")}
    caplog.clear()
    texts["always"] = command(*asked, "--drafts", "always").out
    assert len(set(texts.values())) == 1
    assert re.search(r"\d+ of [1-9]\d* drafted tokens came", caplog.text)
    assert command(*asked, "--keys-values", "int8").code == 0
    assert command(*asked, "--drafts", "never").line == "drafts: must be one of auto, always, off; got 'never'"
    assert command(*asked, "--keys-values", "int4").line == "keys_values: must be one of auto, int8; got 'int4'"


def test_a_terminal_is_not_steered_by_the_model(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = iter(["a\x1b[3", "1mb\r\n"] * 2)
    monkeypatch.setattr(LanguageModel, "stream", lambda *_, **options: [next(pieces), next(pieces)])
    assert command("generate", folder, "x").out == "a\x1b[31mb\r\n\n"  # into a file, as it is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert command("generate", folder, "x").out == "a\ufffd[31mb\ufffd\n\n"


def test_a_prompt_file_that_is_not_utf8(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"abc\xff")
    assert command("generate", checkpoint, "--prompt-file", tmp_path / "prompt").line == (
        f"{tmp_path / 'prompt'}: must be UTF-8 text; got other bytes at place 3"
    )
    assert "No such file" in command("generate", checkpoint, "--prompt-file", tmp_path / "none").line


def test_a_folder_that_is_no_checkpoint(command: Command, tmp_path: Path) -> None:
    assert command("generate", tmp_path / "none", "x").line.startswith(f"{tmp_path / 'none'}: must be a checkpoint")
    assert "config.json: must exist" in command("generate", tmp_path, "x").line


def test_shards_that_are_missing_or_cut(command: Command, folder: Path, tmp_path: Path) -> None:
    save(load_model(folder), tmp_path / "s", shard_bytes=4000)
    shard = sorted((tmp_path / "s").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert command("generate", tmp_path / "s", "--ids", "5").line.startswith(f"{shard}: must be a whole safetensors")
    shard.unlink()
    assert command("generate", tmp_path / "s", "--ids", "5").line.startswith(f"{shard}: must exist")


def test_a_tokenizer_that_does_not_fit(command: Command, folder: Path, tmp_path: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 400, "content": "<SPECIAL_400>"})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert command("generate", folder, "x").line.startswith(
        "tokenizer.json: has 401 ids; the model's vocabulary is 320"
    )
    (folder / "tokenizer.json").write_text("{")
    assert f"{folder / 'tokenizer.json'}: must be JSON" in command("generate", folder, "x").line


def test_a_message_is_answered(command: Command, folder: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "def f"}]
    reply = "".join(load(folder).chat(messages, max_tokens=20))
    options = ["--chat", "--system", "be brief", "--max-tokens", 20]
    assert command("generate", folder, "def f", *options).out == reply + "\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--system", "x"], "system: needs --chat"),
        (["--chat", "--ignore-end"], "chat: must not be given with --ignore-end"),
    ],
)
def test_what_does_not_go_with_a_message_is_refused(command: Command, options: list[str], words: str) -> None:
    assert command("generate", "a", "x", *options).line.startswith(words)
