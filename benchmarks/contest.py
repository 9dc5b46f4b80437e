"""Contestants that take turns: each a process of its own, possibly of another environment, asked for one run at a time.

While one runs the others wait for their next line, so that they share the machine's moods and nothing else. A
contestant is a script that calls `serve` with what it can be asked; questions and answers are JSON, one a line.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Contestant:
    """A script in its own Python, alive until it is closed."""

    def __init__(self, script: Path, arguments: Sequence[str], python: str = sys.executable) -> None:
        self.process = subprocess.Popen(
            [python, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about: dict[str, Any] = self._answer()  # said when it is ready

    def ask(self, question: str, **details: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"question": question, **details}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.stdout.close()  # type: ignore[union-attr]
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"{' '.join(self.process.args)}: ended without an answer")  # type: ignore[arg-type]


def turns(contestants: Sequence[Contestant], question: str, n: int, **details: Any) -> list[list[float]]:
    """What each answers, n times, one after the other; a first round is not counted."""
    rounds = [[contestant.ask(question, **details) for contestant in contestants] for _ in range(n + 1)]
    return [list(runs) for runs in zip(*rounds[1:], strict=True)]


def serve(about: Mapping[str, Any], answers: Mapping[str, Callable[..., Any]]) -> None:
    """A contestant's side: answer until the input ends."""
    print("answer", json.dumps(about), flush=True)
    for line in sys.stdin:
        details = json.loads(line)
        print("answer", json.dumps(answers[details.pop("question")](**details)), flush=True)
