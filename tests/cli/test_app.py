"""The command as its user meets it: quick, quiet, one line an error."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

import nemotron_h
from nemotron_h.cli import app
from nemotron_h.errors import CapacityError

SLOW_TO_IMPORT = {"torch", "numba", "numpy", "huggingface_hub", "jinja2", "psutil", "safetensors", "tokenizers", "yaml"}
IMPORTED = """
import json, sys
from nemotron_h.cli.app import main
try:
    main()
finally:
    sys.stderr.write(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["show", "8b"], ["show", "56b", "--json"], ["-h"]])
def test_it_answers_in_a_blink(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert SLOW_TO_IMPORT.isdisjoint(json.loads(done.stderr))


def test_the_installed_script_is_the_function_that_is_tested() -> None:
    script = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"][
        "nemotron-h"
    ]
    assert EntryPoint("nemotron-h", script, "console_scripts").load() is app.main


def test_version(command: Callable[..., Any]) -> None:
    assert command("--version").out == f"{nemotron_h.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["show"], ["show", "8b", "--nothing"], ["generate", "a", "--max-tokens", "many"]]
)
def test_usage_errors_are_one_line(command: Callable[..., Any], arguments: list[str]) -> None:
    ended = command(*arguments)
    assert ended.line.endswith("; --help shows the usage")
    assert ended.out == ""


def test_no_arguments_show_the_help(command: Callable[..., Any]) -> None:
    bare, asked = command(), command("--help")
    assert (bare.code, bare.out) == (0, asked.out)


def test_a_usage_error_names_its_place(command: Callable[..., Any]) -> None:
    line = command("generate", "a", "--max-tokens", "many").line
    assert "'--max-tokens'" in line
    assert "integer" in line
    assert "frobnicate" in command("frobnicate").line
    assert "Traceback" in command("frobnicate", "--debug").err


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_the_traceback_wherever_it_stands(command: Callable[..., Any], place: int) -> None:
    arguments = ["show", "9b"]
    assert command(*arguments).line.startswith("preset: must be one that exists; got '9b'")
    arguments.insert(place, "--debug")
    ended = command(*arguments)
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert "ConfigError: preset: must be one that exists" in ended.err


def test_debug_after_two_dashes_is_an_argument() -> None:
    assert app.without_debug(["a", "--debug", "--", "--debug"]) == (["a", "--", "--debug"], True)
    assert app.without_debug(["a", "--", "--debug"]) == (["a", "--", "--debug"], False)


def failing(error: BaseException) -> Callable[..., None]:
    def model_config(model: str) -> None:
        raise error

    return model_config


def test_our_own_faults_leave_with_1(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemotron_h.cli.show.model_config", failing(RuntimeError("one\ntwo")))
    ended = command("show", "8b")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == "nemotron-h: internal error: RuntimeError: one two; --debug shows where\n"
    assert "in model_config" in command("show", "8b", "--debug").err


def test_what_the_system_refuses_is_one_line(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    error = PermissionError(13, "Permission denied", "/a/b")
    monkeypatch.setattr("nemotron_h.cli.show.model_config", failing(error))
    assert command("show", "8b").line == "/a/b: Permission denied"
    monkeypatch.setattr("nemotron_h.cli.show.model_config", failing(CapacityError("disk: one\nline")))
    assert command("show", "8b").line == "disk: one line"


def torch_on_a_cpu() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    "error", [MemoryError(), torch_on_a_cpu(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_memory_that_ran_out_is_one_line(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("nemotron_h.cli.show.model_config", failing(error))
    assert command("show", "8b").line.startswith("memory: ran out; ask for less")


def test_an_interrupt_leaves_with_130(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemotron_h.cli.show.model_config", failing(KeyboardInterrupt()))
    ended = command("show", "8b")
    assert ended.code == 130
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["show", "8b"], ["show", "8b", "--json"]])
def test_a_reader_that_leaves_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "nemotron_h", *arguments]
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_does_not_fit_is_one_line() -> None:
    line = [sys.executable, "-m", "nemotron_h", "show", "8b", "--json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "nemotron-h: output: No space left on device\n"
