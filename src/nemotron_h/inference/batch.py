"""Many prompts out of a file of JSON lines, answered into another, together; stopped at any moment, it goes on.

    {"prompt": "..."} or {"ids": [...]}, and if wanted "max_tokens"
    -> {"ids", "text", "logprobs", "matched", "reused", "cut"}, in the order of the prompts; "error" where one failed

An answer is the same whoever is served beside it and however often the job was stopped: its draws depend on the seed
alone. What was reused (`matched`, `reused`, `cut`) does depend on it.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_h.checkpoint.files import locked
from nemotron_h.config.keys import shown
from nemotron_h.config.settings import first_difference
from nemotron_h.errors import DataError, RequestError
from nemotron_h.files import replacing
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.request import Answer, Request

ERROR = ', "error": "'  # in a line: within a text it would stand with backslashes
AHEAD = 2  # times as many requests as run at once are known to the engine: who comes next may share what is being read


@dataclass(frozen=True)
class Prompt:
    """One line."""

    where: str  # the file, and the number of the line
    prompt: str | None
    ids: Sequence[int] | None
    max_tokens: int | None


def read_prompts(path: Path) -> list[Prompt]:
    """All lines of a file. Raises: DataError, naming the line."""
    try:
        lines = path.read_bytes().decode().split("\n")  # not where else text may break: JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: must be a readable file of UTF-8; got {error}") from None
    return [parsed(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]


def parsed(line: str, path: Path, number: int) -> Prompt:
    where = f"{path}, line {number}"
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: must be JSON; got {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: must be an object; got {type(values).__name__}")
    for key in values:
        if key not in ("prompt", "ids", "max_tokens"):
            raise DataError(f"{where}: {shown(key)}: unknown; known are prompt, ids and max_tokens")
    prompt, ids, most = (values.get(key) for key in ("prompt", "ids", "max_tokens"))
    if (prompt is None) == (ids is None):
        raise DataError(f"{where}: must have one of prompt and ids; got {'none' if prompt is None else 'both'}")
    if prompt is not None and not isinstance(prompt, str):
        raise DataError(f"{where}: prompt: must be text; got {type(prompt).__name__}")
    if ids is not None and not (isinstance(ids, list) and ids and all(type(token) is int for token in ids)):
        raise DataError(f"{where}: ids: must be a list of whole numbers, at least one")
    if most is not None and (type(most) is not int or most < 1):
        raise DataError(f"{where}: max_tokens: must be a whole number of 1 or above; got {most!r}")
    return Prompt(where, prompt, ids, most)


def answers(engine: Engine, requests: Sequence[Request], going: Callable[[], bool] = lambda: True) -> Iterator[Answer]:
    """One answer for each request, in their order; each as soon as it and those before it have ended. going: asked
    before each step of the engine; False ends it."""
    waiting, under_way = deque(requests), deque[Answer]()
    while waiting or under_way:
        while waiting and sum(answer.finish is None for answer in under_way) < AHEAD * engine.config.max_running:
            under_way += engine.add(waiting.popleft())
        while under_way and under_way[0].finish is not None:
            yield under_way.popleft()
        if under_way:
            if not going():
                return
            engine.step()


def as_line(answer: Answer) -> str:
    """An answer as JSON."""
    reuse = answer.reuse
    values = {
        "ids": answer.ids,
        "text": answer.text,
        "logprobs": [logprob for logprob, _ in answer.logprobs],
        "matched": reuse.matched if reuse is not None else 0,
        "reused": reuse.reused if reuse is not None else 0,
        "cut": reuse.cut if reuse is not None else None,
    }
    return json.dumps(values if answer.error is None else values | {"error": answer.error}, ensure_ascii=False)


class Output:
    """The file of answers, and beside it what it was begun with: other settings do not go on with it. It belongs to one
    process at a time, until it is closed."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Raises: RequestError where the file was begun with other settings, or is none of ours; CheckpointError where
        another process has it."""
        self.path = path
        self._claim = ExitStack()
        self._claim.enter_context(
            locked(path.with_name(f".{path.name}.lock"), str(path), instead="name another --output")
        )
        try:
            self._open(path, settings)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the file go."""
        self._claim.close()

    def _open(self, path: Path, settings: Mapping[str, Any]) -> None:
        beside = path.with_name(f".{path.name}.settings.json")
        if not path.exists():
            with replacing(beside) as file:
                file.write(json.dumps(dict(settings), indent=2).encode())
            path.touch()
        elif not beside.exists():
            raise RequestError(f"{path}: must be new, or begun by this command; it is neither; name another --output")
        elif (different := first_difference(json.loads(beside.read_bytes()), settings)) is not None:
            name, there, here = different
            rule = "must go on with the settings it was begun with"
            raise RequestError(f"{path}: {rule}; {name} was {there!r}, is {here!r}; name another --output")
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a line that a kill cut short is answered again
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        self.count, self.failed = whole.count(b"\n"), whole.count(ERROR.encode())

    def append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.count, self.failed = self.count + 1, self.failed + line.count(ERROR)
