"""Contestants: processes that take turns, asked one question at a time."""

from pathlib import Path

import pytest

from nemotron_h.evaluate.contestants.contest import Contestant, Failed, turns

SCRIPT = """
import sys
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
    sys.exit("there is no more of it\\n")
serve({"version": sys.argv[2]}, {"count": count, "leave": leave})
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def test_they_take_turns_and_the_first_round_does_not_count(script: Path, tmp_path: Path) -> None:
    two = [Contestant(script, [str(tmp_path / "written"), name]) for name in "ab"]
    assert [each.about for each in two] == [{"version": name, "answers": ["count", "leave"]} for name in "ab"]
    assert turns(two, "count", 2, by=3) == [[6, 9], [6, 9]]
    assert (tmp_path / "written").read_text() == "ababab"
    for each in two:
        each.close()
        assert each.process.returncode == 0


def test_one_that_ends_without_an_answer_is_named_with_its_last_words(script: Path, tmp_path: Path) -> None:
    one = Contestant(script, [str(tmp_path / "written"), "a"])
    with pytest.raises(Failed, match=r"script\.py .* a: there is no more of it$"):
        one.ask("leave")


def test_one_that_was_killed_while_it_waited(script: Path, tmp_path: Path) -> None:
    one = Contestant(script, [str(tmp_path / "written"), "a"])
    one.process.kill()
    one.process.wait()
    with pytest.raises(Failed, match=r": it ended without an answer$"):
        one.ask("count", by=1)
    assert one.ended
    one.close()


def test_one_that_cannot_begin(tmp_path: Path) -> None:
    (tmp_path / "silent.py").write_text("")
    with pytest.raises(Failed, match=r"silent\.py: it ended without an answer$"):
        Contestant(tmp_path / "silent.py", [])
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(Failed, match=r"broken\.py: ModuleNotFoundError: No module named 'nothing_of_this_name'$"):
        Contestant(tmp_path / "broken.py", [])
