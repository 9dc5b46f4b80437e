"""Contestants: processes that take turns, asked one question at a time."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
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


CHILD = """
import subprocess, sys
from contest import serve
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
serve({"version": "1"}, {"child": lambda: child.pid})
"""


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(CHILD)
    one = Contestant(tmp_path / "parent.py", [])
    child = psutil.Process(one.ask("child"))
    for process in (child, psutil.Process(one.process.pid)):  # both wait for the next question
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
    assert one.ask("child") == child.pid
    one.close()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


RACE = """
import sys, time
from pathlib import Path
from nemotron_h.evaluate.contestants.contest import Contestant
one = Contestant(Path(sys.argv[1]), [])
print(one.process.pid, one.ask("child"), flush=True)
time.sleep(600)
"""


def test_a_race_that_was_killed_leaves_nobody(tmp_path: Path) -> None:
    """Though they are stopped."""
    (tmp_path / "parent.py").write_text(CHILD)
    race = subprocess.Popen(
        [sys.executable, "-c", RACE, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True
    )
    assert race.stdout is not None
    left = [psutil.Process(int(pid)) for pid in race.stdout.readline().split()]
    assert len(left) == 2
    race.kill()
    race.communicate()
    _, alive = psutil.wait_procs(left, timeout=10)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


def test_who_is_interrupted_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nfrom contest import serve\nserve({'version': '1'}, {'sleep': lambda: time.sleep(600)})\n"
    )
    one = Contestant(tmp_path / "slow.py", [])
    previous = signal.signal(signal.SIGALRM, interrupted)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            one.ask("sleep")
    finally:
        signal.signal(signal.SIGALRM, previous)
    one.close()
    assert time.monotonic() - began < 30


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_one_that_ends_without_an_answer_is_named_with_its_last_words(script: Path, tmp_path: Path) -> None:
    one = Contestant(script, [str(tmp_path / "written"), "a"])
    with pytest.raises(Failed, match=r"script\.py .* a: there is no more of it$"):
        one.ask("leave")


def test_of_the_last_words_the_error_counts(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import sys\nsys.exit('(Worker 7) ERROR RuntimeError: no memory\\nwarning: a thing leaked\\n')\n"
    )
    with pytest.raises(Failed, match=r": \(Worker 7\) ERROR RuntimeError: no memory$"):
        Contestant(tmp_path / "broken.py", [])


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
