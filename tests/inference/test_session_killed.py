"""A session's file is whole at any moment: the old one or the new one, whatever becomes of the process or the disk."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import CapacityError
from nemotron_h.files import hidden
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.request import Answer, Request
from nemotron_h.model.hybrid import Hybrid
from tests.full_disk import full_disk
from tests.inference.serving import check_alone, check_conserved
from tests.inference.test_engine import SMALL, answered, ids

Build = Callable[..., Hybrid]
REQUEST = Request(ids=ids(300), max_tokens=6, sampling=Sampling(temperature=1.0), logprobs=0)

# For each line that it reads, starts a writer, which writes both sessions over one file, in turns and without end.
PROGRAM = """
import itertools, os, sys, time
from pathlib import Path
from safetensors.torch import save
from nemotron_h.inference import session_file

def save_slowly(tensors, name, metadata):
    whole = save(tensors, metadata)
    with open(name, "wb") as file:
        for begin in range(0, len(whole), 2**14):
            file.write(whole[begin : begin + 2**14])
            file.flush()
            time.sleep(0.001)

sessions = [session_file.read(Path(path)) for path in sys.argv[2:]]
session_file.save_file = save_slowly
for _ in sys.stdin:
    writer = os.fork()
    if not writer:
        for header, tensors in itertools.cycle(sessions):
            session_file.write(Path(sys.argv[1]), header, tensors)
    print(writer, flush=True)
    os.waitpid(writer, 0)
    print("ended", flush=True)
"""


@contextmanager
def writers(path: Path, *sessions: Path) -> Iterator[Callable[[float], None]]:
    """Lets a process write sessions over path for so many seconds, and kills it."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, path, *sessions], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None

        def killed_after(seconds: float) -> None:
            program.stdin.write("\n")
            program.stdin.flush()
            writer = int(program.stdout.readline())
            time.sleep(seconds)
            os.kill(writer, signal.SIGKILL)
            assert program.stdout.readline() == "ended\n"

        yield killed_after
        program.stdin.close()


def two_turns(model: Hybrid, *paths: Path) -> list[Answer]:
    """A conversation, saved after each turn."""
    engine, answers, prompt = Engine(model, config=SMALL), list[Answer](), list(REQUEST.ids)
    for turn, path in enumerate(paths):
        (answer,) = answered(engine, Request(ids=prompt, max_tokens=6, logprobs=0))
        engine.session(answer).save(path)
        answers.append(answer)
        prompt = [*prompt, *answer.ids, *ids(40, seed=turn)]
    return answers


def check_killed(model: Hybrid, folder: Path, *, kills: int, seed: int) -> None:
    path, old, new = (folder / name for name in ("session", "old", "new"))
    said = [[*answer.request.ids, *answer.ids] for answer in two_turns(model, old, new)]
    path.write_bytes(old.read_bytes())
    sizes, rng, found, halves = {one.stat().st_size for one in (old, new)}, Random(seed), list[int](), 0
    with writers(path, old, new) as killed_after:
        while len(found) < kills or (len(found) < 20 * kills and not (halves and set(found) == {0, 1})):
            killed_after(rng.uniform(0, 0.15))
            halves += hidden(path).exists() and hidden(path).stat().st_size not in sizes
            engine = Engine(model, config=SMALL)
            session = engine.restore(path)
            found.append(said.index(session.ids))
            check_alone(model, *answered(engine, session.request(max_tokens=8, logprobs=0)))
    assert set(found) == {0, 1}, found
    assert halves, "no writer was killed inside a write"
    session.save(path)
    assert engine.restore(path).ids == session.ids
    assert sorted(one.name for one in folder.iterdir()) == ["new", "old", "session"]
    check_conserved(engine)


def test_a_file_is_the_old_or_the_new_one_when_its_writer_is_killed(build: Build, tmp_path: Path) -> None:
    check_killed(build(), tmp_path, kills=8, seed=0)


@pytest.mark.slow
def test_so_it_is_after_a_hundred_kills(build: Build, tmp_path: Path) -> None:
    check_killed(build(), tmp_path, kills=100, seed=1)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_full_disk_leaves_the_old_file_whole(build: Build, tmp_path: Path, share: float) -> None:
    model, path = build(), tmp_path / "session"
    engine = Engine(model, config=SMALL)
    (answer,) = answered(engine, REQUEST)
    session = engine.session(answer, extra={"turn": 1})
    session.save(path)
    before = path.read_bytes()
    with (
        full_disk(int(share * len(before))),
        pytest.raises(CapacityError, match=r"session: could not be written: .*; what was there is untouched$"),
    ):
        session.save(path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["session"]
    fresh = Engine(model, config=SMALL)
    assert fresh.restore(path).extra == {"turn": 1}
    session.save(path)
    assert fresh.restore(path).ids == session.ids
