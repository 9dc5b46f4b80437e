"""Messages as keys make them, and out of a pipe."""

import io
import sys
from collections.abc import Callable, Iterator

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from nemotron_h.cli.keyboard import piped, typed

UP, ALT_ENTER, CTRL_C, CTRL_D = "\x1b[A", "\x1b\r", "\x03", "\x04"


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.mark.parametrize(
    ("typed_keys", "message"),
    [
        ("hello\r", "hello"),
        ("one\\\rtwo\r", "one\ntwo"),
        (f"one{ALT_ENTER}two\r", "one\ntwo"),
        ("\x1b[200~pasted\r\nlines\x1b[201~\r", "pasted\nlines"),
        (f"what was{CTRL_C}anew\r", "anew"),
        (f"{UP}!\r", "the last one!"),
        (f"{UP}{UP}\r", "the first one"),
        ("a\\b\r", "a\\b"),
    ],
)
def test_a_message_as_it_is_typed(keys: PipeInput, typed_keys: str, message: str) -> None:
    keys.send_text(typed_keys)
    assert typed(["the first one", "the last one"])("> ") == message


def test_messages_go_into_the_history_and_ctrl_d_ends(keys: PipeInput) -> None:
    read = typed([])
    keys.send_text("one\r")
    assert read("> ") == "one"
    keys.send_text(f"{UP}\r")
    assert read("> ") == "one"
    keys.send_text(CTRL_D)
    with pytest.raises(EOFError):
        read("> ")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\\\ntwo\nthree", ["one\ntwo", "three"]),
        ("one\\", ["one"]),
        ("\n", [""]),
        ("", []),
    ],
)
def test_lines_of_a_pipe(monkeypatch: pytest.MonkeyPatch, text: str, messages: list[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    read: Callable[[str], str] = piped
    assert [read("> ") for _ in messages] == messages
    with pytest.raises(EOFError):
        read("> ")
