"""`nemotron-h quantize`: a folder in int8 or int4, and what is told of it."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console

from nemotron_h import machine
from nemotron_h.checkpoint.load import load as load_model
from nemotron_h.checkpoint.names import WEIGHTS_FILE
from nemotron_h.checkpoint.save import save
from nemotron_h.cli.quantize import counted, drawn, placed
from nemotron_h.inference.load import load, needed_bytes, read
from nemotron_h.inference.quantize import WINDOW, quantize, windows
from nemotron_h.report.units import format_bytes
from tests.checkpoint.stub_hub import Model, connected
from tests.checkpoint.test_quantised import fp8, matrices, nvfp4, quantise

Command = Callable[..., Any]


def told(command: Command, *arguments: object) -> dict[str, Any]:
    ended = command("quantize", *arguments, "--json")
    assert (ended.code, ended.err) == (0, "")
    found: dict[str, Any] = json.loads(ended.out)
    return found


def text_of(checkpoint: Path, count: int, spare: int = 0) -> tuple[str, torch.Tensor]:
    """A text of so many windows and some tokens, and the windows."""
    language = read(checkpoint, dtype=torch.bfloat16)
    assert language.tokenizer is not None
    words = "".join(f"def f{i}(value):\n    return {i} * value\n" for i in range(3000))
    text = language.tokenizer.decode(language.tokenizer.encode(words)[: count * (WINDOW - 1) + spare])
    return text, windows(language.tokenizer, language.model, 1000, text)


@pytest.fixture
def small(command: Command, checkpoint: Path, tmp_path: Path) -> Path:
    assert command("quantize", checkpoint, "--to", "int4", "--out", tmp_path / "small").code == 0
    return tmp_path / "small"


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("feedback", [False, True])
def test_it_writes_what_the_library_makes_of_the_same_text_and_tells_of_it(
    command: Command, checkpoint: Path, tmp_path: Path, precision: str, feedback: bool
) -> None:
    """Every tensor, every number of the report; what is held out are the windows after those rounded for."""
    text, found = text_of(checkpoint, 10)
    (tmp_path / "text").write_text(text)
    options = ["--to", precision, "--out", tmp_path / "small", "--text", tmp_path / "text", "--windows", 8]
    values = told(command, checkpoint, *options, *(["--feedback"] if feedback else []))
    language = read(checkpoint, dtype=torch.bfloat16)
    report = quantize(language.model, precision, found[:8], held_out=found[8:], feedback=feedback)
    wanted, got = dict(language.model.named_parameters()), dict(load_model(tmp_path / "small").named_parameters())
    assert wanted.keys() == got.keys()
    for name, parameter in wanted.items():
        assert torch.equal(got[name], parameter), name
    matrices = values.pop("matrices")
    for key, value in asdict(report).items():
        if key != "matrices":
            assert values[key] == (list(value) if isinstance(value, tuple) else value), key
    assert [{key: one[key] for key in asdict(report.matrices[0])} for one in matrices] == [
        asdict(one) for one in report.matrices
    ]
    assert [(one["kind"], one["layer"]) for one in matrices] == [
        ("Mamba-2 in_proj", 0), ("Mamba-2 out_proj", 0), ("FFN up_proj", 1), ("FFN down_proj", 1),
        *((f"attention {letter}_proj", 2) for letter in "qkvo"), ("FFN up_proj", 3), ("FFN down_proj", 3),
        ("head", None),
    ]  # fmt: skip
    assert values["feedback"] == feedback
    assert values["path"] == str(tmp_path / "small")
    assert values["bytes_before"] == (checkpoint / WEIGHTS_FILE).stat().st_size
    assert values["bytes_after"] == (tmp_path / "small" / WEIGHTS_FILE).stat().st_size
    assert report.loss_before is not None
    assert report.loss_after is not None
    assert values["loss_change_percent"] == pytest.approx(100 * (report.loss_after / report.loss_before - 1))
    stored = [
        p for name, p in wanted.items() if name.rpartition(".")[2] in ["words", "groups", "totals", "scale", "row_bits"]
    ]
    weights = sum(math.prod(one.shape) for one in language.model.matrices.values())
    assert values["bits_per_weight"] == pytest.approx(8 * sum(p.nbytes for p in stored) / weights)


def test_a_person_sees_a_table_and_the_folder(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = told(command, checkpoint, "--to", "int4", "--out", "a")
    ended = command("quantize", checkpoint, "--to", "int4")
    assert ended.err == ""
    *lines, last = [" ".join(line.split()) for line in ended.out.splitlines() if line.strip()]
    assert last == "tiny-int4"
    assert (tmp_path / "tiny-int4" / WEIGHTS_FILE).read_bytes() == (tmp_path / "a" / WEIGHTS_FILE).read_bytes()
    assert lines[0] == "matrices count bits row bits mean error worst layer"
    up = [one for one in values["matrices"] if one["kind"] == "FFN up_proj"]
    worst = max(up, key=lambda one: one["error"])
    mean = sum(one["error"] for one in up) / 2
    assert f"FFN up_proj 2 4 8 {mean:.3g} {worst['error']:.3g} {worst['layer']}" in lines
    before, after = (values[f"loss_{when}"] for when in ("before", "after"))
    assert f"loss, nats a token {before:.4f} {after:.4f} {100 * (after / before - 1):+.2f} %" in lines
    sizes = [values[f"bytes_{when}"] for when in ("before", "after")]
    change = f"{100 * (sizes[1] / sizes[0] - 1):+.1f} %"
    assert f"weights on disk {' '.join(map(format_bytes, sizes))} {change}" in lines
    assert any(line.startswith(f"{values['bits_per_weight']:.2f} bits a weight of the matrices") for line in lines)
    assert any(line.startswith(f"residual stream off by {values['stream_errors'][-1]:.3g} after") for line in lines)
    assert "rounded for 1,024 tokens; loss and stream of 1,024 held out" in lines


MATRIX = {"bits": 4, "row_bits": 8, "weight_error": 0.1, "row_error": 0.01}
TOLD: dict[str, Any] = {
    "loss_before": 2.0, "loss_after": 2.5, "loss_change_percent": 25.0, "bytes_before": 1000, "bytes_after": 250,
    "bits_per_weight": 4.321, "stream_errors": [0.1, 0.3, 0.2], "tokens": 1024, "held_out_tokens": 1024,
    "feedback": True,
}  # fmt: skip


def test_the_worst_comes_first_and_is_named() -> None:
    matrices = [
        {**MATRIX, "kind": "FFN up_proj", "layer": 1, "error": 0.125},
        {**MATRIX, "kind": "FFN up_proj", "layer": 3, "error": 0.375, "row_bits": 16},
        {**MATRIX, "kind": "head", "layer": None, "error": 0.5},
        {**MATRIX, "kind": "FFN up_proj", "layer": 5, "error": 0.25},
    ]
    screen = StringIO()
    console = Console(width=80, file=screen)
    for part in drawn({**TOLD, "matrices": matrices}):
        console.print(part, highlight=False)
    lines = [" ".join(line.split()) for line in screen.getvalue().splitlines() if line.strip()]
    assert lines[2] == "head 1 4 8 0.5 0.5 -"
    assert lines[3] == "FFN up_proj 3 4 8, 16 (1) 0.25 0.375 3"
    assert "residual stream off by 0.2 after the last layer; most, 0.3, after layer 1" in lines
    assert "rounded for 1,024 tokens with error feedback; loss and stream of 1,024 held out" in lines


def test_bits_of_rows_are_counted() -> None:
    assert counted([8, 8]) == "8"
    assert counted([16]) == "16"
    assert counted([16, 8, 16]) == "16, 8 (1)"
    assert placed("lm_head", "M-") == {"kind": "head", "layer": None}
    assert placed("backbone.layers.12.mixer.q_proj", "M" * 12 + "*") == {"kind": "attention q_proj", "layer": 12}


def test_every_verb_takes_the_folder(command: Command, checkpoint: Path, small: Path) -> None:
    answer = load(small).generate("def", max_tokens=8, ignore_end=True)
    generated = command("generate", small, "def", "--max-tokens", 8, "--ignore-end")
    assert (generated.out, generated.err) == (answer + "\n", "")
    asked = ["def", "--max-tokens", 8, "--ignore-end", "--json"]
    assert json.loads(command("generate", small, *asked, "--precision", "int4").out) == {"text": answer}
    refused = command("generate", small, "def", "--precision", "bfloat16").line
    assert refused.startswith(f"precision: must be auto or int4, in which the weights of {small} are; got 'bfloat16'")
    rounded = command("generate", checkpoint, "def", "--max-tokens", 2, "--precision", "int4")
    assert rounded.code == 0
    verified = command("verify", small)
    assert verified.code == 0, verified.out
    assert verified.out.startswith(f"{small} in int4 on cpu, rows in multiples of 1\n")
    assert "parameters (" in (headline := command("show", small).out.splitlines()[0])
    assert headline.endswith(" in int4")
    assert " in int4 " in " ".join(command("show", small / "config.json").out.split())  # a long path breaks the line
    assert json.loads(command("show", small, "--json").out)["format"] == "int4"
    assert json.loads(command("show", checkpoint, "--json").out)["format"] == "bfloat16"
    assert json.loads(command("show", "8b", "--json").out)["format"] is None


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(("form", "algorithm"), [(fp8, "FP8"), (nvfp4, "NVFP4")])
@pytest.mark.filterwarnings("ignore:.*input_scale are passed over")
def test_what_nvidia_publishes_in_few_bits_goes_through_the_same_door(
    command: Command, checkpoint: Path, tmp_path: Path, form: Any, algorithm: str, precision: str
) -> None:
    """Loaded or put into a folder, it is what the weights that it stands for become."""
    few, plain = tmp_path / "few", tmp_path / "plain"
    tokenizer = read(checkpoint, dtype=torch.float32).tokenizer
    save(load_model(checkpoint, dtype=torch.float32), few, dtype=torch.float32, tokenizer=tokenizer)
    assert len(quantise(few, dict.fromkeys(matrices(few), form), algorithm)) == 10
    save(load_model(few, dtype=torch.bfloat16), plain, tokenizer=tokenizer)
    for folder in (few, plain):
        made = command("quantize", folder, "--to", precision, "--out", f"{folder}-small")
        assert made.code == 0, made.err
    assert (tmp_path / "few-small" / WEIGHTS_FILE).read_bytes() == (
        tmp_path / "plain-small" / WEIGHTS_FILE
    ).read_bytes()
    asked = ["def", "--max-tokens", 8, "--ignore-end", "--precision", precision]
    answers = {command("generate", tmp_path / name, *asked).out for name in ("few", "plain", "few-small")}
    assert len(answers) == 1
    assert answers != {command("generate", checkpoint, *asked).out}


@pytest.mark.parametrize("to", ["published", "transformers", "gguf"])
def test_it_is_not_converted(command: Command, small: Path, tmp_path: Path, to: str) -> None:
    line = command("convert", small, "--to", to, "--out", tmp_path / "out").line
    assert line == (
        f"{small}: must hold plain weights, FP8 or NVFP4; got int4, in which nemotron_h alone reads them; take the "
        "checkpoint that it was made from"
    )
    assert not (tmp_path / "out").exists()
    again = command("quantize", small, "--to", "int8", "--out", tmp_path / "out").line
    assert again == line


def test_the_card_says_who_loads_it(small: Path, checkpoint: Path) -> None:
    text = (small / "README.md").read_text()
    assert "library_name" not in ModelCard(text).data.to_dict()
    assert "- Matrices in int4 of nemotron_h, which alone loads them.\n" in text
    assert re.search(r"- Made by `nemotron-h quantize .*/tiny --to int4`", text)
    assert "- Made from tiny.\n" in text
    plain = (checkpoint / "README.md").read_text()
    assert ModelCard(plain).data.library_name == "transformers"
    assert "Matrices in" not in plain


def test_a_model_of_the_hub_is_written_under_its_own_name(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with connected(tmp_path / "home", monkeypatch) as hub:
        hub.models["org/small"] = Model({path.name: path.read_bytes() for path in checkpoint.iterdir()})
        assert command("quantize", "org/small", "--to", "int8").out.endswith("\nsmall-int8\n")
    assert "base_model: org/small\n" in (tmp_path / "small-int8" / "README.md").read_text()


def test_windows_by_default(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    """Few; with error feedback many; of a short text what it has, the last fifth held out."""
    text, found = text_of(checkpoint, 6, spare=100)
    assert len(found) == 6
    (tmp_path / "text").write_text(text)
    few = told(command, checkpoint, "--to", "int4", "--out", tmp_path / "a")
    fed = told(command, checkpoint, "--to", "int4", "--out", tmp_path / "b", "--feedback")
    short = told(
        command, checkpoint, "--to", "int4", "--out", tmp_path / "c", "--feedback", "--text", tmp_path / "text"
    )
    assert f" --to int4 --feedback --text {tmp_path / 'text'}`" in (tmp_path / "c" / "README.md").read_text()
    counts = [(one["tokens"] // WINDOW, one["held_out_tokens"] // WINDOW) for one in (few, fed, short)]
    assert counts == [(2, 2), (64, 16), (5, 1)]


def test_without_a_tokenizer_tokens_are_drawn_and_it_says_so(
    command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    save(load_model(checkpoint), tmp_path / "m")
    ended = command("quantize", tmp_path / "m", "--to", "int8", "--out", tmp_path / "out")
    assert ended.code == 0
    assert "no tokenizer in the folder: tokens are drawn at random" in ended.err
    (tmp_path / "text").write_text("a" * 10_000)
    line = command(
        "quantize", tmp_path / "m", "--to", "int8", "--out", tmp_path / "b", "--text", tmp_path / "text"
    ).line
    assert line == "text: needs a tokenizer in the checkpoint folder, and it has none; leave it out"
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "bfloat16"], "Invalid value for '--to': "),
        ([], "Missing option '--to'"),
        (["--to", "int4", "--windows", 0], "windows: must be 1 or above; got 0"),
        (["--to", "int4", "--text", "absent"], "absent: must be a readable file; got No such file or directory"),
        (["--to", "int4", "--text", "bytes"], "bytes: must be UTF-8 text; got other bytes at place 1"),
        (["--to", "int4", "--text", "empty"], "text: must have 511 tokens or more; got 0"),
        (["--to", "int4", "--text", "one"], "text: must fill 2 windows of 512 tokens, one to round for and one held "),
        (
            ["--to", "int4", "--text", "three", "--windows", 2],
            "windows: must leave 2 held out of the text's 3, of 512 tokens each; got 2; take fewer, or a longer text",
        ),
        (["--to", "int4", "--out", "here"], "here: must not exist, nothing is written over; name another folder"),
    ],
)
def test_what_cannot_be_honoured_is_one_line(
    command: Command,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[object],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"a\xff")
    (tmp_path / "empty").touch()
    (tmp_path / "here").mkdir()
    (tmp_path / "one").write_text(text_of(checkpoint, 1, spare=100)[0])
    (tmp_path / "three").write_text(text_of(checkpoint, 3, spare=100)[0])
    before = sorted(tmp_path.iterdir())
    assert command("quantize", checkpoint, *options).line.startswith(words)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_is_there_is_refused_before_the_work(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemotron_h.inference.quantize.quantize", pytest.fail)
    assert "must not exist" in command("quantize", checkpoint, "--to", "int4", "--out", tmp_path).line
    assert command("quantize", "none", "--to", "int4").line.startswith("none: must be a checkpoint folder")


@pytest.mark.parametrize("place", ["nemotron_h.precision.weights.nearest", "nemotron_h.checkpoint.save.write_shard"])
def test_an_interrupt_leaves_nothing(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """While matrices are rounded, and while the folder is written."""
    monkeypatch.chdir(tmp_path)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    ended = command("quantize", checkpoint, "--to", "int4", "--out", "deep/small")
    assert (ended.code, ended.out) == (130, "")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "deep" / "small").exists()


@pytest.mark.parametrize("feedback", [False, True])
def test_what_does_not_fit_is_refused(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, feedback: bool
) -> None:
    """bfloat16 weights are mapped; of others all must fit in bfloat16; error feedback needs room of its own."""
    model = load_model(checkpoint, dtype=torch.float32)
    save(model, tmp_path / "wide", dtype=torch.float32)
    small, plain = (needed_bytes(model.config, "int4", mapped=mapped) for mapped in (True, False))
    fed = 5 * 8 * 64**2 if feedback else 0  # the widest matrix has 64 inputs
    memory = machine.memory()

    def run(folder: Path, free: int) -> Any:
        monkeypatch.setattr(machine, "memory", lambda: replace(memory, available_bytes=free))
        options = ["--to", "int4", "--out", tmp_path / str(free), "--windows", 1, *(["--feedback"] if feedback else [])]
        return command("quantize", folder, *options)

    assert run(checkpoint, small + fed).code == 0
    line = run(checkpoint, small + fed - 1).line
    assert f"needs {small + fed:,} bytes of memory" in line
    assert line.startswith("feedback: ") == feedback
    assert f"needs {plain + fed:,} bytes of memory" in run(tmp_path / "wide", plain + fed - 1).line
    assert run(tmp_path / "wide", plain + fed).code == 0
