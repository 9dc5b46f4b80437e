from pathlib import Path

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
