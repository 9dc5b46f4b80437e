import re
from pathlib import Path

import pytest

from nemotron_h.errors import CheckpointError
from nemotron_h.training.metrics import Metrics, rows


def test_rows_after_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, 0)
    for step in range(1, 6):
        first.add(step=step, loss=step / 3)
    path.write_text(path.read_text() + '{"step": 6, "lo')  # a kill in the middle of a row
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5]
    second = Metrics(path, 3)
    second.add(step=4, loss=0.1 + 0.2)
    assert rows(path) == [{"step": step, "loss": step / 3} for step in (1, 2, 3)] + [{"step": 4, "loss": 0.1 + 0.2}]


def test_no_file_no_rows(tmp_path: Path) -> None:
    assert rows(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    "damaged", [b'{"loss": 1.0}', b'{"step": "2", "loss": 1.0}', b'{"step": 2}', b"[]", b"{", b"\xff", b""]
)
def test_a_damaged_row_is_refused_by_its_line(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + damaged + b'\n{"step": 3, "loss": 2.0}\n')
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}, line 2: must be a JSON object with step"):
        Metrics(path, 3)
    assert path.read_bytes() == before
