"""`nemotron-h chat`: a conversation in the terminal, or with the lines of a pipe."""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from nemotron_h.cli.process import HELP_DRAFTS, HELP_KEYS_VALUES, HELP_PRECISION
from nemotron_h.signals import SIGNALLED

if TYPE_CHECKING:
    from nemotron_h.inference.conversation import Conversation, Statistics
    from nemotron_h.text.spans import Piece

MAIN = "main"  # the conversation that is there from the start
CUT_OFF = "nemotron-h-chat-"  # begins the file that a conversation is kept in when its terminal dies
SESSION = ".session"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
COMMAND = re.compile(r"(/[a-z]+)(?:\s+(.*))?", re.DOTALL)  # not a path, nor a template's /no_think
COMMANDS = {
    "/save": ("FILE", "write this conversation to a file"),
    "/load": ("FILE", "go on with one that was written"),
    "/rewind": ("[N]", "take back the last turn, or N of them"),
    "/fork": ("[NAME]", "go on as NAME from here, or back to NAME; without it, list them"),
    "/stats": ("", "what the last turn took"),
    "/system": ("[TEXT]", "another system message; without it, show it"),
    "/help": ("", "this list"),
    "/quit": ("", "leave, as Ctrl-D does"),
}
CUTS = {  # why no more of a prompt was reused
    "whole": "all of it",
    "new": "the rest is new",
    "not taken": "no snapshot lay further on",
    "evicted": "a snapshot further on had to go",
    "off": "reuse is off",
}


def chat(
    path: Annotated[str, typer.Argument(help="A checkpoint folder, or org/name[@revision] on the Hub.")],
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    session: Annotated[
        Path | None, typer.Option(help="A file: gone on with where it exists, saved after every turn.")
    ] = None,
    file: Annotated[
        list[str] | None, typer.Option(help="A document to read first (may be given several times).")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="How many tokens a reply has at most.")] = 1024,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token each time.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens of this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many of the likeliest tokens; 0: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first reply; each later one has the next.")] = 0,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="The template's enable_thinking.", show_default=False)
    ] = None,
    precision: Annotated[str, typer.Option(help=HELP_PRECISION)] = "auto",
    keys_values: Annotated[str, typer.Option(help=HELP_KEYS_VALUES)] = "auto",
    drafts: Annotated[str, typer.Option(help=HELP_DRAFTS)] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    memory: Annotated[
        int | None, typer.Option(metavar="BYTES", help="For what is kept between turns; by default what is free.")
    ] = None,
    inexact: Annotated[
        bool, typer.Option("--inexact", help="Take a session that another machine's arithmetic computed.")
    ] = False,
    ignore_defaults: Annotated[
        bool, typer.Option("--ignore-defaults", help="Draw by these options alone, not by the checkpoint's defaults.")
    ] = False,
) -> None:
    """Talk with a model: each message goes on from what was read before.

    Without a terminal, each line of the input is a message.
    """
    from nemotron_h.config.engine import EngineConfig
    from nemotron_h.config.generation import Generation
    from nemotron_h.errors import RequestError

    if max_tokens < 1:
        raise RequestError(f"max_tokens: must be 1 or above; got {max_tokens}")
    drawn: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    sampling = Generation().sampling(**drawn)
    engine_config = EngineConfig(max_running=1, memory_bytes=memory, drafts=drafts)
    documents = read_documents(file or [])
    # after the checks: they import torch
    from nemotron_h.cli.process import settle
    from nemotron_h.cli.pull import folder_of
    from nemotron_h.inference.conversation import Conversation
    from nemotron_h.inference.load import check_keys_values, check_precision, load, usable

    check_precision(precision)
    check_keys_values(keys_values)
    usable(device)
    with nullcontext() if session is None else claimed(session):
        settle()
        language = load(
            folder_of(path), precision=precision, keys_values=keys_values, device=device, engine_config=engine_config
        )
        if not ignore_defaults:
            sampling = language.companions.generation.sampling(**drawn)
        talk = Conversation(
            language,
            system=system,
            documents=documents,
            variables={} if think is None else {"enable_thinking": think},
            max_tokens=max_tokens,
            sampling=sampling,
        )
        Chat(talk, session, inexact=inexact).run()


def claimed(session: Path) -> AbstractContextManager[None]:
    """Two chats on one file would write over each other."""
    from nemotron_h.checkpoint.files import locked

    return locked(session.with_name(f".{session.name}.lock"), str(session), instead="name another --session")


def read_documents(paths: Iterable[str]) -> dict[str, str]:
    """Texts by name."""
    from nemotron_h.cli.generate import read_prompt
    from nemotron_h.errors import RequestError

    documents: dict[str, str] = {}
    for path in paths:
        if path in documents:
            raise RequestError(f"file: must be given once each; got {path} twice")
        documents[path] = read_prompt(path)
    return documents


class Chat:
    """Conversations by name, the one that is current, and what its user sees of them."""

    def __init__(self, talk: "Conversation", session: Path | None, *, inexact: bool) -> None:
        self.talks, self.name = {MAIN: talk}, MAIN
        self.session, self.inexact = session, inexact
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # the template refuses what is no UTF-8, in a line
        self.refused = False  # something, so far
        self.ended: int | None = None  # by this signal
        self.interrupted = False
        self.waiting = False  # for the user

    @property
    def talk(self) -> "Conversation":
        return self.talks[self.name]

    def run(self) -> None:
        """Talk until the user leaves. Whatever else ends it, what was read and said is kept in a file."""
        from nemotron_h.cli.keyboard import as_it_was
        from nemotron_h.errors import NemotronError

        self.begin()
        with as_it_was(), self.signals():
            try:
                self.read_documents()
                if self.interactive:
                    self.say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves", dim=True)
                self.converse()
            except NemotronError:  # documents that do not fit, or a disk that does not take them
                raise
            except BaseException as error:
                if isinstance(error, OSError) and error.errno == errno.EIO:
                    self.ended = self.ended or signal.SIGHUP  # the terminal has gone; its signal may come later
                if not (self.interactive or self.ended or self.session):
                    raise  # a pipe's messages are there to be sent again
                self.keep()
                if self.ended is None and (sys.stdout.isatty() or not self.interactive):
                    raise
                silence(sys.stdout, sys.stderr)
                raise SystemExit(1 if self.ended is None else SIGNALLED + self.ended) from None
        if self.refused and not self.interactive:
            raise SystemExit(2)

    def begin(self) -> None:
        """Check what is there before the first message: a session to go on with, or what the template takes."""
        if self.session is not None and self.session.exists():
            self.go_on(self.session)
        else:
            self.talk.instruct(self.talk.system)
        cut_off = sorted(Path.cwd().glob(f"{CUT_OFF}*{SESSION}"))
        if self.session is None and cut_off:
            self.note(f"{cut_off[-1].name}: a conversation that was cut off; --session goes on with it")

    def go_on(self, path: Path) -> None:
        """With a session's conversation, if that is what was asked for."""
        from nemotron_h.errors import RequestError

        asked = {"system": self.talk.system, "file": self.talk.documents}
        self.talk.load(path, inexact=self.inexact)
        for name, there in (("system", self.talk.system), ("file", self.talk.documents)):
            if asked[name] and asked[name] != there:
                raise RequestError(f"{name}: must stay what {path} was begun with; got another; leave it out")
        self.recall()

    def read_documents(self) -> None:
        """Before the first message. Who is stopped here goes on from there the next time."""
        from rich.console import Console

        from nemotron_h.cli.watch import Watch

        if not self.talk.documents or self.talk.turns:
            return
        with Watch(Console(stderr=True), "read") as watch, closing(self.talk.read()) as places:
            total = 0
            for reused, known, total in places:
                left = watch.seconds * (total - known) / max(1, known - reused)
                watch.fraction(known / total, f"{known:,} of {total:,} tokens, about {left:.0f} s to go")
                if self.interrupted or self.ended is not None:
                    raise KeyboardInterrupt
            watch.say(f"{total:,} tokens of {', '.join(self.talk.documents)} in {watch.seconds:.1f} s")
        self.remember()

    def converse(self) -> None:
        """Message for message, until the user leaves."""
        from nemotron_h.cli.keyboard import piped, typed
        from nemotron_h.errors import NemotronError

        read = typed([turn.message for turn in self.talk.turns]) if self.interactive else piped
        while True:
            if self.ended is not None:
                raise SystemExit
            if self.interrupted and not self.interactive:
                raise KeyboardInterrupt
            try:
                line = self.wait(read)
                if line.rstrip() == "/quit":
                    return
                if line.strip():
                    self.take(line)
            except EOFError:
                if self.interactive and not sys.stdin.isatty():  # the terminal has gone: nobody typed Ctrl-D
                    raise
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
            except NemotronError as error:
                self.refused = True
                self.note(str(error))

    def wait(self, read: Callable[[str], str]) -> str:
        """For the user's next message."""
        self.waiting = True
        try:
            return read("> " if self.name == MAIN else f"{self.name}> ")
        finally:
            self.waiting = False

    def take(self, line: str) -> None:
        """A command or a message."""
        from nemotron_h.config.settings import nearest
        from nemotron_h.errors import RequestError

        command = COMMAND.fullmatch(line.strip()) if line.startswith("/") else None
        if command is None:
            self.answer(line)
            return
        name, argument = command[1], (command[2] or "").strip()
        takes = COMMANDS.get(name, ("",))[0]
        if name not in COMMANDS:
            raise RequestError(f"command: must be one of /help; got {name}; {nearest(name, list(COMMANDS))}")
        if bool(argument) > bool(takes) or (takes == "FILE" and not argument):
            raise RequestError(f"{name}: takes {takes or 'nothing'}; got {argument or 'nothing'}")
        actions: Mapping[str, Callable[[str], None]] = {
            "/save": self.save,
            "/load": self.load,
            "/rewind": self.rewind,
            "/fork": self.fork,
            "/stats": self.stats,
            "/system": self.instruct,
            "/help": self.help,
        }
        actions[name](argument)

    def answer(self, message: str) -> None:
        turns = len(self.talk.turns)
        with closing(self.talk.reply(message)) as pieces:  # if the terminal dies now, what has come is the reply
            self.show(pieces)
        if len(self.talk.turns) == turns:
            self.say("stopped before the first word; the message is taken back", dim=True)
            return
        self.remember()
        statistics = self.talk.turns[-1].statistics
        if statistics.stopped:
            self.say(f"stopped after {statistics.reply_tokens:,} tokens", dim=True)
        elif statistics.finish == "length":
            self.say(f"cut at {statistics.reply_tokens:,} tokens; --max-tokens gives more", dim=True)
        if self.interactive:
            self.say("")

    def show(self, pieces: "Iterable[Piece]") -> None:
        """A reply as it comes: its thinking dim, or, where there is no terminal, between its marks."""
        from nemotron_h.text.spans import THINK, THINK_END

        styled = sys.stdout.isatty()
        thinking = False
        for piece in pieces:
            if piece.kind == "marker":
                continue
            if thinking != (piece.kind == "reasoning"):
                thinking = not thinking
                mark = "" if styled else f"{THINK}\n" if thinking else f"\n{THINK_END}"
                self.say(mark if thinking else f"{mark}\n\n", end="")
            self.say(piece.text, end="", dim=thinking)
        self.say(f"\n{THINK_END}" if thinking and not styled else "")

    def save(self, argument: str) -> None:
        from nemotron_h.errors import DataError, RequestError
        from nemotron_h.inference.session_file import read_header
        from nemotron_h.report.units import format_bytes

        path = Path(argument).expanduser()
        if path.exists():
            try:
                read_header(path)
            except DataError:
                raise RequestError(f"{path}: must be new, or a session of this version; name another") from None
        self.talk.save(path)
        self.say(f"{path}: {count(len(self.talk.turns))}, {format_bytes(path.stat().st_size)}", dim=True)

    def load(self, argument: str) -> None:
        """Beside what is there, unless nothing was said yet."""
        path, name, number = Path(argument).expanduser(), self.name, 2
        talk = self.talk.fork()
        talk.load(path, inexact=self.inexact)
        if self.talk.turns:
            first = name = re.sub(r"[^\w-]+", "-", path.stem)
            while name in self.talks:
                name, number = f"{first}-{number}", number + 1
        self.talks[name], self.name = talk, name
        self.recall()

    def rewind(self, argument: str) -> None:
        from nemotron_h.errors import RequestError

        if argument and not argument.isdecimal():
            raise RequestError(f"/rewind: takes a number of turns; got {argument}")
        self.talk.rewind(int(argument or 1))
        self.remember()
        self.say(f"taken back; {count(len(self.talk.turns))} before here", dim=True)

    def fork(self, argument: str) -> None:
        from nemotron_h.errors import RequestError

        if not argument:
            for name, talk in self.talks.items():
                self.say(f"{'*' if name == self.name else ' '} {name}: {count(len(talk.turns))}", dim=True)
            return
        if not re.fullmatch(r"[\w-]+", argument):
            raise RequestError(f"/fork: takes a name of letters, digits, - and _; got {argument}")
        if argument not in self.talks:
            talk = self.talk.fork()
            if self.session is not None and (path := named(self.session, argument)).exists():
                talk.load(path, inexact=self.inexact)  # it was begun another time
            self.talks[argument] = talk
        before, self.name = self.name, argument
        self.say(f"in {argument}: {count(len(self.talk.turns))}; /fork {before} goes back", dim=True)

    def stats(self, argument: str) -> None:
        turns = self.talk.turns
        self.say(described(turns[-1].statistics) if turns else "no turn yet", dim=True)

    def instruct(self, argument: str) -> None:
        if argument:
            self.talk.instruct(argument)
        self.say(f"system: {self.talk.system or 'none'}", dim=True)

    def help(self, argument: str) -> None:
        for name, (takes, what) in COMMANDS.items():
            self.say(f"{f'{name} {takes}':<15} {what}", dim=True)
        self.say("Enter sends; Alt+Enter, or a \\ before Enter, begins another line", dim=True)
        self.say("a space before the / makes a message of it", dim=True)

    def recall(self) -> None:
        """Where a conversation that is gone on with stands."""
        turns = self.talk.turns
        self.say(count(len(turns)) + (", the last of them:" if turns else ""), dim=True)
        if turns:
            self.say(f"> {turns[-1].message}\n{turns[-1].content}\n", dim=True)

    def remember(self) -> None:
        """Save it, where that was asked for."""
        if self.session is not None:
            self.talk.save(named(self.session, self.name))

    def keep(self) -> None:
        """Save all conversations, and say where, if anybody can still read it."""
        from nemotron_h.errors import NemotronError

        base = self.session or Path(f"{CUT_OFF}{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}{SESSION}")
        for name, talk in self.talks.items():
            path = named(base, name)
            with suppress(OSError):
                if talk.turns or talk.documents:
                    try:
                        talk.save(path)
                        self.note(f"kept in {path}; --session goes on with it")
                    except NemotronError as error:
                        self.note(str(error))

    def say(self, text: str, *, end: str = "\n", dim: bool = False) -> None:
        """On stdout; a terminal only shows it."""
        from nemotron_h.cli.summary import printable

        if sys.stdout.isatty():
            text = printable(text)
            text = f"{DIM}{text}{PLAIN}" if dim and text and os.environ.get("TERM") != "dumb" else text
        print(text, end=end, flush=True)

    def note(self, line: str) -> None:
        """One line on stderr."""
        from nemotron_h.cli.summary import printable

        print(printable(" ".join(line.split())), file=sys.stderr, flush=True)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Those that end an answer, or all: an answer ends between two passes, for one that is broken off would have
        to be read again."""

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT:
                self.interrupted = True
            else:
                self.ended = number
            self.talk.stop()
            if self.waiting:
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def described(statistics: "Statistics") -> str:
    """In a line."""
    reused = f"{statistics.reused_tokens:,} of them reused ({CUTS[statistics.cut]})"
    parts = [f"{statistics.prompt_tokens:,} tokens of prompt, {reused}"]
    if statistics.first_token_seconds is not None:
        parts.append(f"first token after {statistics.first_token_seconds:.2f} s")
    rate = f" at {statistics.tokens_per_second:,.1f} tokens/s" if statistics.tokens_per_second is not None else ""
    parts.append(f"{statistics.reply_tokens:,} tokens of reply{rate}")
    if statistics.drafted_tokens:
        parts.append(f"{statistics.accepted_tokens:,} of {statistics.drafted_tokens:,} drafted ones came")
    return "; ".join([*parts, *(["stopped"] if statistics.stopped else [])])


def count(turns: int) -> str:
    return f"{turns} turn{'' if turns == 1 else 's'}"


def named(base: Path, name: str) -> Path:
    """The file of a conversation by name, beside the first one's."""
    return base if name == MAIN else base.with_stem(f"{base.stem}-{name}")


def silence(*streams: TextIO) -> None:
    """What is written from now on goes nowhere, instead of failing once more."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
