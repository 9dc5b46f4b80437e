"""The audit: a cache that would change an answer is caught, and the answer is right nevertheless."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_h.config.engine import EngineConfig
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.memory import Memory
from nemotron_h.inference.prefix import Cut, Keys
from nemotron_h.inference.request import Request
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.state import MambaState, State
from tests.inference.serving import check_alone, check_conserved

Build = Callable[..., Hybrid]
AUDITED = EngineConfig(
    max_running=3, memory_bytes=4_000_000, portion_tokens=96, poisoned=True, audit_fraction=1.0, pages_fraction=0.6
)
PROMPT = torch.randint(0, 352, (600,), generator=torch.Generator().manual_seed(0)).tolist()
COPY, KEEP, SAVED = State.copy_slot, Memory.keep, Memory.saved


def copied(spoil: Callable[[State, int], None], running: int = AUDITED.max_running) -> Any:
    """copy_slot, whose copies out of snapshots are then spoilt."""

    def copy_slot(self: State, source: int, target: int) -> None:
        COPY(self, source, target)
        if target <= running < source:
            spoil(self, target)

    return copy_slot


def stale_slot(self: State, source: int, target: int) -> None:
    self.positions[target], self.tables[target] = self.positions[source], list(self.tables[source])
    layer = next(layer for layer in self.layers if isinstance(layer, MambaState))
    before = layer.boundary[target].nan_to_num().clone()
    COPY(self, source, target)
    layer.boundary[target] = before


def off_by_one(self: Memory, row: int, keys: Keys, *rest: Any, **options: Any) -> Any:
    self.state.positions[row] -= 1
    kept = KEEP(self, row, keys[:-1], *rest, **options)
    self.state.positions[row] += 1
    return kept


def without_conv_inputs(self: State, target: int) -> None:
    for layer in self.layers:
        if isinstance(layer, MambaState):
            layer.conv[target] = 0


def of_another_group(self: State, target: int) -> None:
    for layer in self.layers:
        if isinstance(layer, MambaState):
            layer.B[target] = layer.B[target].roll(1, 0)


def with_a_page_dropped(self: State, target: int) -> None:
    table = self.tables[target]
    self.tables[target] = [*table[1:], *table[:1]]


def without_logits(self: Memory, snapshots: Any) -> dict[str, Tensor]:
    saved = SAVED(self, snapshots)
    return saved | {name: torch.zeros_like(saved[name]) for name in saved if name.endswith("logits")}


BUGS = {
    "stale slot": (State, "copy_slot", stale_slot, "boundary"),
    "snapshot off by one": (Memory, "keep", off_by_one, "logits"),  # the state can go back, what it gave cannot
    "missing conv inputs": (State, "copy_slot", copied(without_conv_inputs), "conv"),
    "wrong head group": (State, "copy_slot", copied(of_another_group), "B"),
    "dropped page": (State, "copy_slot", copied(with_a_page_dropped), "keys"),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught_and_changes_no_answer(
    build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    engine = Engine(build(), config=AUDITED)
    where, method, bug, what = BUGS[name]
    with monkeypatch.context() as planted:
        planted.setattr(where, method, bug)
        answers = list(engine.add(Request(ids=PROMPT, max_tokens=1)))
        engine.run()
        longer = Request(ids=[*PROMPT, 5, 6, 7], max_tokens=5, logprobs=1)
        with caplog.at_level(logging.WARNING):
            answers += engine.add(longer)
            engine.run()
    assert engine.counts.audits == 1
    assert engine.memory.distrusted is not None
    assert engine.memory.distrusted.endswith(what), engine.memory.distrusted
    assert engine.memory.distrusted in caplog.text
    assert not engine.memory.prefixes.snapshots
    answers += engine.add(longer)
    engine.run()
    assert answers[-1].reuse is not None
    assert answers[-1].reuse.cut is Cut.OFF
    check_alone(engine.model, *answers)
    check_conserved(engine)


def test_who_began_at_a_snapshot_that_is_not_trusted_begins_again(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(build(), config=replace(AUDITED, max_running=2))
    engine.add(Request(ids=PROMPT, max_tokens=1))
    engine.run()
    monkeypatch.setattr(State, "copy_slot", copied(without_conv_inputs, running=2))
    draws = iter([0.9, 0.0])  # the first is not audited, the second is
    monkeypatch.setattr(engine.scheduler, "config", replace(engine.config, audit_fraction=0.5))
    monkeypatch.setattr(engine.scheduler._audits, "random", lambda: next(draws))
    answers = [
        *engine.add(Request(ids=PROMPT + PROMPT + PROMPT[:300], max_tokens=3, logprobs=1)),
        *engine.add(Request(ids=[*PROMPT, 5], max_tokens=3, logprobs=1)),
    ]
    engine.step()
    assert [sequence.audited is not None for sequence in engine.scheduler.running] == [False, True]
    engine.run()
    assert engine.memory.distrusted is not None
    check_alone(engine.model, *answers)
    check_conserved(engine)


def test_after_a_failed_audit_nothing_is_left_in_the_folder(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = replace(AUDITED, snapshot_folder=tmp_path)
    with monkeypatch.context() as planted, Engine(build(), config=replace(settings, audit_fraction=0.0)) as engine:
        engine.add(Request(ids=PROMPT, max_tokens=1))
        engine.run()
        planted.setattr(Memory, "saved", without_logits)
    (tmp_path / "of_others.snapshot").write_bytes(b"not ours to judge")
    written = len(list(tmp_path.glob("*.snapshot")))
    assert written > 1
    with Engine(build(), config=settings) as engine:
        (answer,) = engine.add(Request(ids=[*PROMPT, 5], max_tokens=3))
        engine.run()
        assert engine.memory.distrusted is not None
        assert engine.memory.distrusted.endswith("logits")
        check_alone(engine.model, answer)
    assert [path.name for path in tmp_path.glob("*.snapshot")] == ["of_others.snapshot"]


def test_without_a_bug_nothing_is_found(build: Build) -> None:
    engine = Engine(build(precision="bfloat16"), config=AUDITED)
    answers = []
    for length in (600, 600, 590, 300, 599):
        answers += engine.add(Request(ids=[*PROMPT[:length], length % 352], max_tokens=4, logprobs=1))
        engine.run()
    assert engine.counts.audits >= 3
    assert engine.memory.distrusted is None
    check_alone(engine.model, *answers)
    check_conserved(engine)


def test_a_hit_on_a_prompt_that_was_cancelled_half_read_is_audited(build: Build) -> None:
    engine = Engine(build(), config=AUDITED)
    (half,) = engine.add(Request(ids=PROMPT[:180]))
    engine.step()
    engine.cancel(half)
    (answer,) = engine.add(Request(ids=PROMPT[:180], max_tokens=3))
    engine.run()
    assert answer.reuse is not None
    assert answer.reuse.reused == 96
    assert (engine.counts.audits, engine.memory.distrusted) == (1, None)
    check_alone(engine.model, answer)
    check_conserved(engine)


def test_a_share_of_hits_is_audited(build: Build) -> None:
    engine = Engine(build(), config=EngineConfig(max_running=1, memory_bytes=4_000_000, audit_fraction=0.25))
    for _ in range(201):
        engine.add(Request(ids=PROMPT[:64], max_tokens=1))
        engine.run()
    assert 30 <= engine.counts.audits <= 70
    assert engine.counts.read_tokens == 64 * (1 + engine.counts.audits)
