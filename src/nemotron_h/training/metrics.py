"""Metrics of a run as JSON lines, one object a step; a resumed run continues the file where its checkpoint stands."""

import json
from pathlib import Path
from typing import Any

from nemotron_h.checkpoint.files import write_text, writing


class Metrics:
    """Rows of {"step": ...}; opened at a step, later rows of an interrupted run are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows(path) if row["step"] <= step))

    def add(self, **row: Any) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a row cut short by a kill is no row."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
