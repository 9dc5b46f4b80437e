"""What a long job shows while it runs: a bar on a terminal, lines elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Watch:
    """One stage's bar and its lines. again: what to type to go on with a job that was stopped."""

    def __init__(self, console: Console, name: str, *, again: str = "the same command") -> None:
        self.console, self.name, self.again = console, name, again
        self.began = time.perf_counter()
        self.bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(name, total=1.0, note="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def fraction(self, done: float, note: str = "") -> None:
        """How much is done, 0 to 1, and a few words beside it."""
        self.bar.update(self.task, completed=done, note=note)

    def say(self, line: str) -> None:
        """One line that stays."""
        self.console.print(f"{self.name:<10} {line}", markup=False, highlight=False, soft_wrap=True)
