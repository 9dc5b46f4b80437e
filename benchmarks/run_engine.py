"""This project's engine as a contestant. Arguments: a checkpoint folder, a precision."""

import random
import sys
import tempfile
import time
from pathlib import Path

import psutil
from contest import serve

import nemotron_h
from nemotron_h import Engine, EngineConfig, Request
from nemotron_h.inference.load import load
from nemotron_h.inference.request import Answer
from nemotron_h.machine import tune_memory

tune_memory()  # as the command does
language = load(sys.argv[1], precision=sys.argv[2])
model = language.model
rng = random.Random(0)
engine = Engine(model, config=EngineConfig(max_running=16))


def prompt(length: int) -> list[int]:
    """Tokens that nobody has seen."""
    return [rng.randrange(model.config.vocab_size) for _ in range(length)]


def answered(engine: Engine, ids: list[int], new: int = 2) -> Answer:
    (answer,) = engine.add(Request(ids=ids, max_tokens=new))
    engine.run()
    return answer


def to_first_token(answer: Answer) -> float:
    assert answer.begun is not None
    return answer.begun - answer.added


def turns(length: int) -> dict[str, float]:
    """Seconds to the first token: of a new prompt, of the same again, of a turn of 20 tokens after it; and of a step of
    one sequence, the mean of 32."""
    ids = prompt(length)
    cold, same = answered(engine, ids), answered(engine, ids)
    turn = answered(engine, [*ids, *same.ids, *prompt(20)])
    assert same.reuse is not None
    assert turn.reuse is not None
    assert (same.reuse.reused, turn.reuse.reused) == (length, length + 1)
    (long,) = engine.add(Request(ids=[*ids, 7], max_tokens=33))
    while long.begun is None:
        engine.step()
    engine.run()
    assert long.ended is not None
    found = {name: to_first_token(answer) for name, answer in (("cold", cold), ("same", same), ("turn", turn))}
    return found | {"step": (long.ended - long.begun) / 32}


def session(length: int) -> dict[str, float]:
    """Seconds to save a conversation, to restore it in another engine, and to read it anew."""
    ids = prompt(length)
    cold = answered(engine, ids)
    with tempfile.TemporaryDirectory() as folder:
        held = engine.session(cold)
        began = time.perf_counter()
        held.save(Path(folder) / "one")
        saved = time.perf_counter()
        held.close()
        size = (Path(folder) / "one").stat().st_size
        other = Engine(model, config=EngineConfig(max_running=1))
        other.session([]).sessions.prints  # noqa: B018 - of the weights: once a process
        restoring = time.perf_counter()
        restored = other.restore(Path(folder) / "one")
        ended = time.perf_counter()
    again = answered(other, [*ids, *cold.ids])
    assert again.reuse is not None
    assert again.reuse.reused == length + 1
    restored.close()
    return {"save": saved - began, "restore": ended - restoring, "read": to_first_token(cold), "bytes": size}


def memory(length: int) -> int:
    """Bytes of the process after a prompt of that length, above those before it."""
    answered(engine, prompt(512))
    before = psutil.Process().memory_info().rss
    answered(engine, prompt(length))
    return psutil.Process().memory_info().rss - before


about = {"version": f"nemotron-h {nemotron_h.__version__}"}
serve(about, {"turns": turns, "session": session, "memory": memory})
