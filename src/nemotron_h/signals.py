"""SIGINT and SIGTERM, collected instead of obeyed: a long job ends at a place it can go on from."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SIGNALLED = 128  # and the signal's number: the exit code of who was stopped by it


@contextmanager
def stop_signals() -> Iterator[Sequence[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second SIGINT interrupts as usual.

    In a thread, where Python takes no handlers, nothing is collected.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
