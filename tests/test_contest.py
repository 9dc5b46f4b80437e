"""Contestants of the benchmarks: processes that take turns, asked one question at a time."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPT = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from contest import serve
print("a library's own words")
path = sys.argv[1]
asked = []
def count(by):
    with open(path, "a") as file:
        file.write(sys.argv[2])
    asked.append(by)
    return sum(asked)
def leave():
    sys.exit(1)
serve({{"version": sys.argv[2]}}, {{"count": count, "leave": leave}})
"""


@pytest.fixture
def contest() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contest", BENCHMARKS / "contest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_they_take_turns_and_the_first_round_does_not_count(contest: ModuleType, tmp_path: Path) -> None:
    script, written = tmp_path / "script.py", tmp_path / "written"
    script.write_text(SCRIPT)
    two = [contest.Contestant(script, [str(written), name]) for name in "ab"]
    assert [each.about["version"] for each in two] == ["a", "b"]
    assert contest.turns(two, "count", 2, by=3) == [[6, 9], [6, 9]]
    assert written.read_text() == "ababab"
    for each in two:
        each.close()
        assert each.process.returncode == 0


def test_one_that_ends_without_an_answer_is_named(contest: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    one = contest.Contestant(script, [str(tmp_path / "written"), "a"])
    with pytest.raises(SystemExit, match=r"script\.py .* a: ended without an answer"):
        one.ask("leave")
    one.close()
