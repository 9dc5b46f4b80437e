"""Metrics of a run as JSON lines, one object a step; a resumed run continues the file where its checkpoint stands."""

import json
from pathlib import Path
from typing import Any

from nemotron_h.checkpoint.files import write_text, writing
from nemotron_h.errors import CheckpointError


class Metrics:
    """Rows of {"step": ..., "loss": ...}; opened at a step, later rows of an interrupted run are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows(path) if row["step"] <= step))

    def add(self, **row: Any) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a last one cut short by a kill is no row. Raises: CheckpointError where one is damaged."""
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def row(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("step"), int) or "loss" not in found:
        raise CheckpointError(f"{where}: must be a JSON object with step and loss; got {line!r}; remove the line")
    return found
