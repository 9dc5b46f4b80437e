"""Contestants that take turns: each a process of its own, possibly of another environment, asked for one run at a time.

While one runs the others are stopped, with all that they have started, so that they share the machine's moods and its
memory, and nothing else. A contestant is a script that calls `serve` with what it can be asked; questions and answers
are JSON, one a line. This file is all of ours that such a script finds, for its environment need not have the rest.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

ERROR = re.compile(r"\b[A-Z]\w*(?:Error|Exception): ")

if __name__ == "contest":  # in a contestant: under nohup it and what it starts would ignore that its race has gone
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

OURS_ALONE = "THP_MEM_ALLOC_ENABLE"  # a switch of torch's that our command sets for itself


class Failed(Exception):
    """A contestant ended. words: its last ones."""

    def __init__(self, who: str, words: str) -> None:
        super().__init__(f"{who}: {words}")
        self.words = words


class Contestant:
    """A script in its own Python, alive until it is closed. Raises: Failed where it ends before it answers."""

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str],
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """environment: what is set for it besides ours. Of our Python's paths another one is told nothing."""
        self.ended = False
        self._asked = True  # is an answer to come, the first being that it is ready?
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - what it writes to stderr, until it is closed
        own = os.environ.get("PYTHONPATH") if python == sys.executable else None
        paths = [str(Path(__file__).parent), *filter(None, [own])]
        inherited = {name: value for name, value in os.environ.items() if name != OURS_ALONE}
        self.process = subprocess.Popen(
            [python, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            process_group=0,  # with all that it starts; stopped ones whose race has gone get a SIGHUP from the kernel
            env=inherited | {"PYTHONPATH": os.pathsep.join(paths)} | dict(environment or {}),
        )
        self.about: dict[str, Any] = self._answer()  # said when it is ready

    def ask(self, question: str, **details: Any) -> Any:
        assert self.process.stdin is not None
        self._asked = True
        self._tell(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # it has ended, as its answer will tell
            self.process.stdin.write(json.dumps({"question": question, **details}) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        if self.ended:
            return
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, with a question unread
            self.process.stdin.close()
        self.process.stdout.close()
        self._tell(signal.SIGKILL if self._asked else signal.SIGCONT)  # who was interrupted is not waited for
        self.process.wait()
        self._tell(signal.SIGKILL)  # what it has left behind
        self._said.close()

    def _tell(self, what: signal.Signals) -> None:
        """It and all that it has started."""
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(self.process.pid, what)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):
                self._tell(signal.SIGSTOP)
                os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # it takes a moment
                self._asked = False
                return json.loads(line.removeprefix("answer "))
        self._said.seek(0)
        lines = [line.strip() for line in self._said if line.strip()] or ["it ended without an answer"]
        errors = [line for line in lines if ERROR.search(line)]  # warnings may follow it
        self.close()
        self.ended = True
        raise Failed(" ".join(map(str, self.process.args)), (errors or lines)[-1])  # type: ignore[arg-type]


class Asked(Protocol):
    """Who takes turns."""

    def ask(self, question: str, **details: Any) -> Any: ...


def turns(contestants: Sequence[Asked], question: str, n: int, **details: Any) -> list[list[float]]:
    """What each answers, n times, one after the other; a first round is not counted."""
    rounds = [[contestant.ask(question, **details) for contestant in contestants] for _ in range(n + 1)]
    return [list(runs) for runs in zip(*rounds[1:], strict=True)]


def serve(about: Mapping[str, Any], answers: Mapping[str, Callable[..., Any]]) -> None:
    """A contestant's side: answer until the input ends."""
    print("answer", json.dumps({**about, "answers": list(answers)}), flush=True)
    for line in sys.stdin:
        details = json.loads(line)
        print("answer", json.dumps(answers[details.pop("question")](**details)), flush=True)
