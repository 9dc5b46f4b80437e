"""Messages as they are typed at a terminal, or come through a pipe."""

import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress


def typed(history: Iterable[str]) -> Callable[[str], str]:
    """Reads messages at a terminal, of several lines where the user wants them. Raises: EOFError for Ctrl-D."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory(list(history)),
        key_bindings=keys,
        multiline=True,
        prompt_continuation=lambda width, number, wrapped: " " * width,
    )
    return session.prompt


def piped(prompt: str) -> str:
    """The next line of stdin; one that ends in a backslash goes on in the next. Raises: EOFError at the end."""
    lines: list[str] = []
    while line := sys.stdin.readline():
        lines.append(line.removesuffix("\n"))
        if not lines[-1].endswith("\\"):
            return "\n".join(lines)
        lines[-1] = lines[-1][:-1]
    if lines:
        return "\n".join(lines)
    raise EOFError


@contextmanager
def as_it_was() -> Iterator[None]:
    """Leave the terminal as it was, also where a signal came just as the prompt was changing it."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        with suppress(termios.error, ValueError, OSError):  # the terminal has gone
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
