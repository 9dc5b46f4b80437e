"""Snapshots in a folder outlive memory and the process, to the bit, under a limit."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemotron_h.config.engine import EngineConfig
from nemotron_h.errors import CheckpointError
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.memory import Memory
from nemotron_h.inference.prefix import Cut
from nemotron_h.inference.request import Answer, Request
from nemotron_h.model.hybrid import Hybrid
from tests.inference.serving import check_alone, check_conserved
from tests.inference.test_engine import answered, ids

Build = Callable[..., Hybrid]
REQUEST = Request(ids=ids(300), max_tokens=5, logprobs=1)


def config(folder: Path, **change: object) -> EngineConfig:
    """Room for few snapshots in memory."""
    small = EngineConfig(max_running=2, memory_bytes=680_000, portion_tokens=96, poisoned=True, snapshot_folder=folder)
    return replace(small, **change)


def reused(answer: Answer) -> int:
    assert answer.reuse is not None
    return answer.reuse.reused


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int4"])
def test_what_was_read_before_the_process_began_is_reused(build: Build, tmp_path: Path, precision: str) -> None:
    model = build(precision=precision)
    with Engine(model, config=config(tmp_path, memory_bytes=2_000_000)) as engine:
        (first,) = answered(engine, REQUEST)
    with Engine(model, config=config(tmp_path)) as engine:
        longer = [*REQUEST.ids, *first.ids, *ids(20, seed=1)]
        answers = answered(engine, replace(REQUEST, ids=longer))
        assert reused(answers[0]) == 304
        answers += answered(engine, REQUEST)
        assert reused(answers[1]) == 300
        check_alone(model, first, *answers)
        check_conserved(engine)


def test_what_memory_has_no_room_for_comes_back_on_a_hit(build: Build, tmp_path: Path) -> None:
    with Engine(build(), config=config(tmp_path)) as engine:
        requests = [Request(ids=ids(400, seed=seed), max_tokens=2) for seed in range(6)]
        assert len(requests) > engine.memory.sizes.snapshots
        answered(engine, *requests)
        again = answered(engine, *requests)
        assert [answer.reuse.cut for answer in again] == [Cut.WHOLE] * 6  # type: ignore[union-attr]
        check_alone(engine.model, *again)
        check_conserved(engine)


def test_a_prompt_that_was_cancelled_half_read_takes_no_whole_ones_place(build: Build, tmp_path: Path) -> None:
    model = build()
    with Engine(model, config=config(tmp_path)) as engine:
        (half,) = engine.add(Request(ids=ids(180)))
        engine.step()
        assert engine.scheduler.positions == [96]
        engine.cancel(half)
    for cut in (Cut.NEW, Cut.WHOLE):
        with Engine(model, config=config(tmp_path)) as engine:
            (answer,) = answered(engine, Request(ids=ids(180)[:96], max_tokens=2))
            assert answer.reuse is not None
            assert answer.reuse.cut is cut
            check_alone(model, answer)


def test_the_longest_unused_goes_where_the_limit_is_reached(build: Build, tmp_path: Path) -> None:
    model = build()
    with Engine(model, config=config(tmp_path)) as engine:
        answered(engine, *[Request(ids=ids(300, seed=seed), max_tokens=1) for seed in range(8)])
    files = sorted(tmp_path.glob("*.snapshot"), key=lambda path: path.stat().st_mtime_ns)
    sizes = {path: path.stat().st_size for path in files}
    os.utime(files[0])  # the first is used again
    limit = sum(sizes.values()) // 2
    with Engine(model, config=config(tmp_path, snapshot_folder_bytes=limit)):
        left = set(tmp_path.glob("*.snapshot"))
    assert files[0] in left
    assert set(files[-2:]) <= left
    assert files[1] not in left
    assert sum(sizes[path] for path in left) <= limit


def test_a_salt_is_not_written_and_still_told_apart(build: Build, tmp_path: Path) -> None:
    model = build()
    with Engine(model, config=config(tmp_path)) as engine:
        answered(engine, replace(REQUEST, cache_salt="a user's secret"))
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.glob("*.snapshot"))
    with Engine(model, config=config(tmp_path)) as engine:
        answers = answered(
            engine, replace(REQUEST, cache_salt="another's"), replace(REQUEST, cache_salt="a user's secret")
        )
        assert [reused(answer) for answer in answers] == [0, 300]


def test_files_of_another_model_or_damaged_are_not_used(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine(build(seed=1), config=config(tmp_path)) as engine:
        answered(engine, REQUEST)
    with caplog.at_level(logging.INFO), Engine(build(), config=config(tmp_path)) as engine:
        (answer,) = answered(engine, REQUEST)
        assert reused(answer) == 0
        assert "weights is" in caplog.text
    # the header is whole, a tensor is not: found when it is needed
    for path in tmp_path.glob("*.snapshot"):
        content = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        content[header + json.loads(content[8:header])["snapshots.0.logits"]["data_offsets"][0]] ^= 1
        path.write_bytes(content)
    caplog.clear()
    with caplog.at_level(logging.WARNING), Engine(build(), config=config(tmp_path)) as engine:
        (answer,) = answered(engine, REQUEST)
        assert reused(answer) == 0
        assert "is damaged, its digest differs" in caplog.text
        check_alone(engine.model, answer)
        check_conserved(engine)


def test_a_folder_belongs_to_one_process_at_a_time(build: Build, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nemotron_h.checkpoint.files import claimed\n"
        "with claimed(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            CheckpointError, match="must not be in use; another process has it; wait, or name another folder"
        ):
            Engine(build(), config=config(tmp_path))
        other.kill()
    Engine(build(), config=config(tmp_path)).close()


def test_a_disk_that_takes_nothing_stops_nobody(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with caplog.at_level(logging.WARNING), Engine(build(), config=config(tmp_path)) as engine:
        answers = answered(engine, *[Request(ids=ids(300, seed=seed), max_tokens=2) for seed in range(6)])
        check_alone(engine.model, *answers)
    assert "a snapshot is not kept: " in caplog.text
    assert not list(tmp_path.glob("*.snapshot"))


def test_changed_weights_leave_the_folder_alone(build: Build, tmp_path: Path) -> None:
    model = build()
    with Engine(model, config=config(tmp_path)) as engine:
        answered(engine, REQUEST)
        with torch.no_grad():
            model.backbone.layers[0].mixer.D.add_(1)
        (answer,) = answered(engine, REQUEST)
        assert reused(answer) == 0
    assert not list(tmp_path.glob("*.snapshot"))


def test_weights_whose_change_was_noticed_half_are_noticed_again(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Memory) -> None:
        raise KeyboardInterrupt

    model = build()
    with Engine(model, config=config(tmp_path)) as engine:
        answered(engine, *[Request(ids=ids(300, seed=seed), max_tokens=1) for seed in range(8)])
        with torch.no_grad():
            model.head_weight.mul_(2)
        answers = engine.add(REQUEST)
        with monkeypatch.context() as patch:
            patch.setattr(Memory, "forget", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        engine.run()
        assert engine.scheduler.store is None
        check_alone(model, *answers)
        check_conserved(engine)
