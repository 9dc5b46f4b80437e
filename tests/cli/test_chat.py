"""A conversation in a terminal and in a pipe."""

import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.cli.chat import Chat, claimed
from nemotron_h.config.engine import EngineConfig
from nemotron_h.inference.conversation import Conversation
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.load import LanguageModel, load
from nemotron_h.report.units import format_bytes
from nemotron_h.text.spans import Piece
from tests.cli.conftest import COMMAND, Ended

SMALL = ["--memory", 4_000_000, "--precision", "float32"]
STATS = re.compile(r"([\d,]+) tokens of prompt, ([\d,]+) of them reused \(([^)]*)\); first token after .* s; (\d+) tok")
PROMPT, END = "\x1b[?2004h", "\x1b[?2004l"  # pasting is bracketed while a message is typed


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def endless(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose end token stands for no text, and is never drawn."""
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("endless") / "m"))
    (folder / "generation_config.json").write_text('{"eos_token_id": 319}')
    return folder


@pytest.fixture
def chat(
    command: Callable[..., Ended], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, list[Any]], Ended]:
    """The command with those lines of input."""

    def run(lines: str, options: list[Any]) -> Ended:
        given = io.BytesIO(lines.encode(errors="surrogateescape"))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given, encoding="utf-8"))
        return command("chat", checkpoint, *SMALL, *options)

    return run


def language(checkpoint: Path) -> LanguageModel:
    return load(checkpoint, precision="float32", engine_config=EngineConfig(max_running=1, memory_bytes=4_000_000))


def numbers(text: str) -> list[tuple[int, int]]:
    """Tokens of each prompt whose statistics are shown, and how many were reused."""
    return [(int(found[1].replace(",", "")), int(found[2].replace(",", ""))) for found in STATS.finditer(text)]


def test_lines_of_a_pipe_are_messages(chat: Callable[..., Ended], checkpoint: Path) -> None:
    options = ["--max-tokens", 9, "--temperature", 1, "--seed", 3, "--system", "be brief"]
    ended = chat("def f\n\ntwo\\\nlines\n/stats\n", options)
    assert (ended.code, ended.err) == (0, "")
    drawn = language(checkpoint).companions.generation.sampling(temperature=1, seed=3)
    talk = Conversation(language(checkpoint), system="be brief", max_tokens=9, sampling=drawn)
    replies = ["".join(piece.text for piece in talk.reply(text)) for text in ("def f", "two\nlines")]
    cut = "cut at 9 tokens; --max-tokens gives more"
    *shown, stats = ended.out.removesuffix("\n").rsplit("\n", 1)
    assert shown == [f"{replies[0]}\n{cut}\n{replies[1]}\n{cut}"]
    last = talk.turns[-1].statistics
    assert numbers(stats) == [(last.prompt_tokens, last.reused_tokens)]
    assert last.reused_tokens > talk.turns[0].statistics.prompt_tokens - 3


def test_commands(chat: Callable[..., Ended], here: Path) -> None:
    lines = [
        *("one", "/save a.session", "/fork idea", "two", "/stats", "/fork", "/fork main", "/rewind", "/stats"),
        *(
            "two",
            "/load a.session",
            "/fork",
            "/system be long",
            "/system",
            " /stats",
            "/no_think",
            "/help",
            "/quit",
            "x",
        ),
    ]
    ended = chat("\n".join(lines), ["--max-tokens", 4, "--temperature", 0])
    assert (ended.code, ended.err) == (0, "")
    said = [line for line in ended.out.splitlines() if not line.startswith("cut at")]
    for line in (
        f"a.session: 1 turn, {format_bytes((here / 'a.session').stat().st_size)}",
        "in idea: 1 turn; /fork main goes back",
        "  main: 1 turn",
        "* idea: 2 turns",
        "in main: 1 turn; /fork idea goes back",
        "taken back; 0 turns before here",
        "no turn yet",
        "1 turn, the last of them:",
        "* a: 1 turn",
        "  idea: 2 turns",
    ):
        assert line in said, line
    assert said.count("system: be long") == 2
    assert ended.out.count("cut at") == 5  # what begins with a space, and /no_think, are messages; nothing after /quit
    assert any(line.startswith("/rewind [N]") for line in said)


def test_what_is_refused_is_one_line_and_the_conversation_goes_on(chat: Callable[..., Ended]) -> None:
    lines = [
        "/stat",
        "/frobnicate",
        "/save",
        "/stats now",
        "/rewind",
        "/rewind x",
        "/load none",
        "/fork a/b",
        "\udcff",
        "one",
    ]
    ended = chat("\n".join(lines), ["--max-tokens", 4])
    assert ended.code == 2
    assert ended.err.splitlines() == [
        "command: must be one of /help; got /stat; did you mean /stats?",
        "command: must be one of /help; got /frobnicate; "
        "known: /save, /load, /rewind, /fork, /stats, /system, /help, /quit",
        "/save: takes FILE; got nothing",
        "/stats: takes nothing; got now",
        "turns: there are none to take back; got 1",
        "/rewind: takes a number of turns; got x",
        "none: no such session; name one that was saved",
        "/fork: takes a name of letters, digits, - and _; got a/b",
        "messages[0].content: must be Unicode without lone surrogates; got U+DCFF at character 0",
    ]
    assert ended.out.endswith("cut at 4 tokens; --max-tokens gives more\n")


def test_a_session_is_gone_on_with(chat: Callable[..., Ended], here: Path) -> None:
    (here / "doc.txt").write_text("a document\n" * 20)
    options = ["--session", "s", "--max-tokens", 4, "--temperature", 0, "--system", "be brief", "--file", "doc.txt"]
    first = chat("one\n/fork idea\nother\n", options)
    again = chat("two\n/stats\n", options)
    assert (first.code, again.code) == (0, 0), first.err + again.err
    assert again.out.startswith("1 turn, the last of them:\n> one\n")
    assert "read" not in again.err
    [(prompt, reused)] = numbers(again.out)
    assert prompt > reused > 100
    assert chat("", ["--session", "s-idea"]).out.startswith("2 turns, the last of them:\n> other\n")
    assert chat("", ["--session", "s"]).out.startswith("2 turns, the last of them:\n> two\n")
    assert chat("", ["--session", "s", "--system", "be long"]).line == (
        "system: must stay what s was begun with; got another; leave it out"
    )


def test_a_fault_in_a_pipe_is_told_and_what_was_said_is_kept(
    chat: Callable[..., Ended], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = Conversation.reply

    def broken(talk: Conversation, message: str) -> Iterator[Piece]:
        if message == "two":
            raise RuntimeError("out of memory on the GPU")
        yield from reply(talk, message)

    with monkeypatch.context() as patch:
        patch.setattr(Conversation, "reply", broken)
        ended = chat("one\ntwo\n", ["--max-tokens", 4, "--session", "new/s"])
    assert (ended.code, ended.err.splitlines()[-1][:29]) == (2, "nemotron-h: memory: ran out; ")
    assert chat("", ["--session", "new/s"]).out.startswith("1 turn, the last of them:\n> one\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_documents_were_read_is_heard_before_the_first_message(
    chat: Callable[..., Ended], here: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (here / "doc.txt").write_text("def function(value):\n" * 20)
    remember = Chat.remember

    def signalled(self: Chat) -> None:
        os.kill(os.getpid(), number)
        remember(self)

    monkeypatch.setattr(Chat, "remember", signalled)
    monkeypatch.setattr("nemotron_h.cli.chat.silence", lambda *streams: None)  # it would take pytest's own
    ended = chat("one\n", ["--file", "doc.txt", "--session", "s", "--max-tokens", 4])
    assert (ended.code, ended.out) == (128 + number, "")


def test_a_session_is_one_chats_at_a_time(chat: Callable[..., Ended], here: Path) -> None:
    with claimed(here / "s"):
        line = "s: must not be in use; another process has it; wait, or name another --session"
        assert chat("one\n", ["--session", "s"]).line == line
    assert chat("one\n", ["--session", "s", "--max-tokens", 4]).code == 0


def test_a_fork_of_another_time_is_gone_on_with(chat: Callable[..., Ended], here: Path) -> None:
    options = ["--session", "s", "--max-tokens", 4, "--temperature", 0]
    chat("one\n/fork idea\nother\n", options)
    again = chat("/fork idea\nmore\n", options)
    assert "in idea: 2 turns; /fork main goes back\n" in again.out
    assert chat("", ["--session", "s-idea"]).out.startswith("3 turns, the last of them:\n> more\n")


def test_no_file_but_a_session_is_saved_over(chat: Callable[..., Ended], here: Path) -> None:
    (here / "report.md").write_text("precious\n")
    ended = chat("one\n/save report.md\n/save talk\n/save talk\n", ["--max-tokens", 4])
    assert ended.err.count("\n") == 1
    assert "report.md: must be new, or a session of this version; name another" in ended.err
    assert (here / "report.md").read_text() == "precious\n"


def test_documents_are_read_before_the_first_question(chat: Callable[..., Ended], here: Path) -> None:
    for name in ("a.md", "b.md"):
        (here / name).write_text(f"# {name}\n" + "def function(value):\n" * 30)
    ended = chat("one\n/stats\n", ["--file", "a.md", "--file", "b.md", "--max-tokens", 4])
    known = re.fullmatch(r"read       ([\d,]+) tokens of a.md, b.md in \d+\.\d s\n", ended.err)
    assert known is not None
    [(prompt, reused)] = numbers(ended.out)
    assert reused == int(known[1].replace(",", ""))
    assert reused > prompt - 25


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_stopped_while_documents_are_read_goes_on_from_there(
    chat: Callable[..., Ended], here: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (here / "doc.txt").write_text("def function(value):\n" * 200)
    options = ["--file", "doc.txt", "--max-tokens", 4, *(["--session", "s"] if number == signal.SIGINT else [])]
    step, read = Engine.step, []

    def stopped(engine: Engine) -> Any:
        updates = step(engine)
        read.append(engine.counts.read_tokens)
        if len(read) == 2:
            os.kill(os.getpid(), number)
        return updates

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stopped)
        patch.setattr("nemotron_h.cli.chat.silence", lambda *streams: None)  # it would take pytest's own
        ended = chat("one\n", options)
    assert ended.code == 128 + number
    assert len(read) == 2  # which two passes read
    [path] = (path for path in here.iterdir() if path.name not in ("doc.txt", ".s.lock"))
    assert ended.err.endswith(f"kept in {path.name}; --session goes on with it\n")
    places: list[tuple[int, int, int]] = []
    original = Conversation.read

    def watched(talk: Conversation) -> Iterator[tuple[int, int, int]]:
        for place in original(talk):
            places.append(place)
            yield place

    monkeypatch.setattr(Conversation, "read", watched)
    again = chat("one\n/stats\n", ["--session", path.name, "--max-tokens", 4])
    assert again.code == 0
    reused, _, total = places[-1]
    assert reused == read[-1] < total
    assert f"{total:,} tokens of doc.txt" in again.err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--max-tokens", "0"], "max_tokens: must be 1 or above; got 0"),
        (["--temperature", "-1"], "temperature: must be 0 or above; got -1.0"),
        (["--memory", "0"], "memory_bytes: must be 1 or above, or None; got 0"),
        (["--precision", "int3"], "precision: must be one of auto, bfloat16, float32, int8, int4; got 'int3'"),
        (["--file", "none"], "none: must be a readable file; got No such file or directory"),
        (["--file", __file__, "--file", __file__], f"file: must be given once each; got {__file__} twice"),
    ],
)
def test_options_are_checked_before_the_model_is_read(command: Callable[..., Ended], options: Any, line: str) -> None:
    assert command("chat", "no-such-folder", *options).line == line


def test_no_think_needs_a_template_that_takes_it(chat: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def reply(talk: Conversation, message: str) -> Iterator[Piece]:
        taken.append(talk.variables)
        yield Piece("content", "x")

    with monkeypatch.context() as patch:
        patch.setattr(Conversation, "reply", reply)
        for option in ([], ["--think"], ["--no-think"]):
            chat("one\n", option)
    assert taken == [{}, {"enable_thinking": True}, {"enable_thinking": False}]
    monkeypatch.setattr("nemotron_h.text.template.built_in", lambda tokenizer: "{{ messages[0].content }}")
    assert chat("one\n", ["--no-think"]).line == (
        "enable_thinking: must be a variable of the chat template; it has none"
    )


def test_thinking_is_dim_and_a_terminal_is_not_steered(
    chat: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(talk: Conversation, message: str) -> Iterator[Piece]:
        yield from (Piece("reasoning", "So\x1b[31m"), Piece("marker", "\n</think>\n"))
        yield from (Piece("content", "Yes\r\n"), Piece("call", "<tool_call>"))

    monkeypatch.setattr(Conversation, "reply", reply)
    taken_back = "stopped before the first word; the message is taken back"
    plain = chat("one\n", []).out
    assert plain == f"<think>\nSo\x1b[31m\n</think>\n\nYes\r\n<tool_call>\n{taken_back}\n"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = chat("one\n", []).out
    assert shown == f"\x1b[2mSo\ufffd[31m\x1b[0m\n\nYes\ufffd\n<tool_call>\n\x1b[2m{taken_back}\x1b[0m\n"


def test_a_conversation_that_was_cut_off_is_mentioned(chat: Callable[..., Ended], here: Path) -> None:
    chat("one\n/save nemotron-h-chat-20260101-120000-7.session\n", ["--max-tokens", 4])
    line = "nemotron-h-chat-20260101-120000-7.session: a conversation that was cut off; --session goes on with it\n"
    assert chat("", []).err == line
    assert chat("", ["--session", "other"]).err == ""


def test_sigterm_under_an_answer_ends_it_and_keeps_it(
    chat: Callable[..., Ended], checkpoint: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step

    def terminated(engine: Engine) -> Any:
        updates = step(engine)
        if any(update.token is not None for update in updates):
            os.kill(os.getpid(), signal.SIGTERM)
        return updates

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", terminated)
        patch.setattr("nemotron_h.cli.chat.silence", lambda *streams: None)  # it would take pytest's own
        ended = chat("one\ntwo\n", ["--max-tokens", 30, "--temperature", 0])
    assert ended.code == 128 + signal.SIGTERM
    [path] = here.iterdir()
    assert ended.err == f"kept in {path.name}; --session goes on with it\n"
    talk = Conversation(language(checkpoint))
    talk.load(path)
    assert [(turn.message, turn.statistics.reply_tokens) for turn in talk.turns] == [("one", 1)]


class Terminal:
    """The command in a pseudo-terminal, and what it has written there."""

    def __init__(self, *arguments: object) -> None:
        self.fd, slave = pty.openpty()
        line = [sys.executable, "-c", f"{OWN_TERMINAL}\n{COMMAND}", "chat", *map(str, arguments)]
        environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            line, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
        )
        os.close(slave)
        self.text = ""

    def send(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def until(self, words: str) -> None:
        """Read on until those words have come; what came up to them is forgotten."""
        while words not in self.text:
            self.read()
        self.text = self.text.partition(words)[2]

    def hear(self, length: int) -> None:
        """Until something is being said."""
        self.text = ""
        while len(self.text) < length:
            self.read()

    def read(self) -> None:
        ready, _, _ = select.select([self.fd], [], [], 60)
        assert ready, f"nothing more came; {self.text!r}"
        self.text += os.read(self.fd, 65536).decode(errors="replace")


# else the terminal is open, and yet not the one whose end is heard of
OWN_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"


@contextmanager
def terminal(*arguments: object) -> Iterator[Terminal]:
    opened = Terminal(*arguments)
    try:
        yield opened
    finally:
        opened.process.kill()
        opened.process.wait()


def test_ctrl_c_stops_an_answer_and_sigterm_keeps_the_conversation(endless: Path, here: Path) -> None:
    with terminal(endless, *SMALL, "--max-tokens", 10_000, "--temperature", 1) as screen:
        screen.until(PROMPT)
        for message in ("one\\\rline", "two"):
            screen.send(f"{message}\r")
            screen.until(END)
            screen.hear(30)
            screen.send("\x03")
            screen.until("stopped after ")
            screen.until(PROMPT)
        screen.process.send_signal(signal.SIGTERM)
        screen.until("kept in ")
        assert screen.process.wait(30) == 128 + signal.SIGTERM
        assert termios.tcgetattr(screen.fd)[3] & termios.ICANON  # the terminal is as it was
        os.close(screen.fd)
    [path] = here.glob("nemotron-h-chat-*.session")
    talk = Conversation(language(endless), max_tokens=4)
    talk.load(path)
    assert [(turn.message, turn.statistics.stopped) for turn in talk.turns] == [("one\nline", True), ("two", True)]


def test_a_terminal_that_dies_under_an_answer_leaves_a_session(endless: Path, here: Path) -> None:
    options = ["--max-tokens", 10_000, "--temperature", 1, "--session", "s"]
    with terminal(endless, *SMALL, *options) as screen:
        screen.until(PROMPT)
        screen.send("one\r")
        screen.until(END)
        screen.hear(30)
        os.close(screen.fd)
        assert screen.process.wait(30) == 128 + signal.SIGHUP
    assert sorted(path.name for path in here.iterdir()) == [".s.lock", "s"]
    talk = Conversation(language(endless), max_tokens=4)
    talk.load(here / "s")
    [turn] = talk.turns
    assert turn.statistics.stopped
    assert len(turn.content) > 4
    list(talk.reply("two"))
    assert talk.turns[1].statistics.reused_tokens >= turn.statistics.prompt_tokens - 2


def test_a_reader_that_leaves_a_pipe_leaves_no_session(checkpoint: Path, here: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-c", COMMAND, "chat", str(checkpoint), *map(str, SMALL)]
    done = subprocess.run(line, input="one\n", stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 1
    assert "rror" not in done.stderr
    assert list(here.iterdir()) == []
