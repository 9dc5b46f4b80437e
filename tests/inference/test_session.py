"""A session restored is the conversation as it was, to the bit, or it is refused by name."""

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import CapacityError, DataError, RequestError
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.prefix import Cut
from nemotron_h.inference.request import Answer, Request
from nemotron_h.model import fingerprint
from nemotron_h.model.check import Arithmetic
from nemotron_h.model.hybrid import Hybrid
from tests.inference.serving import check_alone, check_conserved
from tests.inference.test_engine import PRECISIONS, SMALL, answered, ids

Build = Callable[..., Hybrid]
REQUEST = Request(ids=ids(300), max_tokens=6, sampling=Sampling(temperature=1.0, seed=3), logprobs=1, boundaries=[200])


def saved(model: Hybrid, path: Path, **extra: Any) -> Answer:
    """A conversation of one turn, in a file."""
    engine = Engine(model, config=SMALL)
    (answer,) = answered(engine, REQUEST)
    engine.session(answer, extra=extra).save(path)
    return answer


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_restored_session_is_reused_by_whoever_begins_like_it(build: Build, tmp_path: Path, precision: str) -> None:
    """The same prompt, a longer, a shorter, an edited one, and the answer again."""
    model = build(precision=precision)
    first = saved(model, tmp_path / "one")
    engine = Engine(model, config=SMALL)
    session = engine.restore(tmp_path / "one")
    assert session.places == [200, 300, 305]
    check_conserved(engine)
    said = [*REQUEST.ids, *first.ids]
    found = {}
    for name, prompt in {
        "longer": [*said, *ids(20, seed=1)],
        "same": said[:-1],
        "shorter": said[:280],
        "edited": [*said[:240], *ids(30, seed=2)],
        "regenerated": said[:300],
    }.items():
        (answer,) = answered(engine, replace(REQUEST, ids=prompt, boundaries=()))
        check_alone(model, answer)
        assert answer.reuse is not None
        found[name] = answer.reuse.reused, answer.reuse.cut
    assert found == {
        "longer": (305, Cut.NEW),
        "same": (305, Cut.WHOLE),
        "shorter": (200, Cut.NOT_TAKEN),
        "edited": (200, Cut.NOT_TAKEN),
        "regenerated": (300, Cut.WHOLE),
    }
    session.close()
    check_conserved(engine)


def test_an_answer_under_way_goes_on_in_another_engine_with_its_next_draw(build: Build, tmp_path: Path) -> None:
    model = build()
    request = replace(REQUEST, max_tokens=20)
    (whole,) = answered(Engine(model, config=SMALL), request)
    engine = Engine(model, config=SMALL)
    (begun,) = engine.add(request)
    while len(begun.ids) < 9:
        engine.step()
    engine.session(begun).save(tmp_path / "half")
    engine = Engine(model, config=SMALL)
    restored = engine.restore(tmp_path / "half")
    (rest,) = answered(engine, restored.request(max_tokens=20, logprobs=1))
    assert rest.ids == whole.ids
    assert rest.logprobs == whole.logprobs[9:]
    assert engine.counts.read_tokens == 20 - 9


@pytest.mark.parametrize(("length", "places"), [(180, []), (300, [96])])
def test_a_prompt_that_is_half_read_is_saved_as_far_as_it_was(
    build: Build, tmp_path: Path, length: int, places: list[int]
) -> None:
    """Where no logits are known, reading goes on and no answer begins."""
    model = build()
    engine = Engine(model, config=SMALL)
    (half,) = engine.add(Request(ids=ids(length)))
    engine.step()
    assert engine.scheduler.positions == [96]
    with closing(engine.session(half)) as session:
        assert ([snapshot.node.end for snapshot in session.snapshots], session.places) == ([96], places)
        session.save(tmp_path / "half")
    engine = Engine(model, config=SMALL)
    restored = engine.restore(tmp_path / "half")
    assert restored.places == places
    (whole,) = answered(engine, restored.request(max_tokens=6, logprobs=1))
    assert whole.reuse is not None
    assert whole.reuse.reused == 96
    (there,) = answered(engine, Request(ids=ids(length)[:96], max_tokens=2))
    assert restored.places == [96]  # they are known by now
    check_alone(model, whole, there)
    check_conserved(engine)


def test_what_is_held_stays_and_what_is_let_go_may_go(build: Build) -> None:
    engine = Engine(build(), config=SMALL)
    (answer,) = answered(engine, REQUEST)
    session = engine.session(answer)
    for seed in range(1, 40):
        answered(engine, Request(ids=ids(700, seed=seed), max_tokens=1))
    assert session.places == [200, 300, 305]
    (again,) = answered(engine, replace(REQUEST, ids=[*REQUEST.ids, *answer.ids]))
    assert again.reuse is not None
    assert again.reuse.reused == 305
    session.close()
    session.close()
    assert not any(snapshot.pins for snapshot in engine.memory.prefixes.snapshots.values())
    with pytest.raises(RequestError, match=r"^session: must be open; it was closed"):
        session.save("anywhere")


def test_forks_and_rewinds(build: Build, tmp_path: Path) -> None:
    engine = Engine(build(), config=SMALL)
    (answer,) = answered(engine, REQUEST)
    session = engine.session(answer)
    fork = session.fork()
    with pytest.raises(
        RequestError, match=r"^position: must be a place with a snapshot; got 250; there are 200, 300, 305$"
    ):
        fork.rewind(250)
    fork.rewind(200)
    assert (fork.ids, fork.places) == (REQUEST.ids[:200], [200])
    assert session.places == [200, 300, 305]
    fork.save(tmp_path / "fork")
    fork.close()
    session.close()
    other = Engine(engine.model, config=SMALL)
    restored = other.restore(tmp_path / "fork")
    (edited,) = answered(other, restored.request(max_tokens=4))
    assert edited.reuse is not None
    assert edited.reuse.cut is Cut.WHOLE
    check_alone(engine.model, edited)


def test_what_the_caller_adds_comes_back(build: Build, tmp_path: Path) -> None:
    model = build()
    saved(model, tmp_path / "one", messages=[{"role": "user", "content": "Grüße"}])
    assert Engine(model, config=SMALL).restore(tmp_path / "one").extra == {
        "messages": [{"role": "user", "content": "Grüße"}]
    }


def test_a_session_is_of_one_salt(build: Build, tmp_path: Path) -> None:
    model = build()
    saved(model, tmp_path / "one")
    engine = Engine(model, config=SMALL)
    engine.restore(tmp_path / "one", salt="mine")
    reused = [answered(engine, replace(REQUEST, cache_salt=salt))[0].reuse.reused for salt in ("", "mine")]  # type: ignore[union-attr]
    assert reused == [0, 300]


def test_a_session_of_another_model_precision_or_tokenizer_is_refused(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "one"
    saved(build(), path)
    with pytest.raises(DataError, match=r"one: must be of the model that restores it; weights is \w+ there, \w+ here$"):
        Engine(build(seed=1), config=SMALL).restore(path, inexact=True)
    with pytest.raises(DataError, match="precision is float32 there, bfloat16 here"):
        Engine(build(precision="bfloat16"), config=SMALL).restore(path, inexact=True)


def test_weights_that_were_changed_in_place_are_other_weights(build: Build, tmp_path: Path) -> None:
    model = build()
    engine = Engine(model, config=SMALL)
    (before,) = answered(engine, REQUEST)
    engine.session(before).save(tmp_path / "one")
    with torch.no_grad():
        model.backbone.layers[0].mixer.D.add_(1)
    (after,) = answered(engine, REQUEST)
    assert after.reuse is not None
    assert (after.reuse.reused, after.reuse.cut) == (0, Cut.NEW)
    check_alone(model, after)
    check_conserved(engine)
    with pytest.raises(DataError, match="weights is"):
        engine.restore(tmp_path / "one")


def test_another_arithmetic_is_refused_unless_asked_for_and_then_kept_apart(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = build(), tmp_path / "one"
    saved(model, path)
    here = fingerprint.arithmetic(model)
    there = {**here, "machine": {**here["machine"], "threads": 64}}
    engine = Engine(model, config=SMALL)
    monkeypatch.setattr(fingerprint, "arithmetic", lambda model: there)
    rule = r"one: must have been computed by this machine's arithmetic; machine.threads is 1 there, 64 here; --inexact"
    with pytest.raises(DataError, match=rule):
        engine.restore(path)
    session = engine.restore(path, inexact=True)
    assert not session.exact
    (shared,) = answered(engine, REQUEST)
    (own,) = answered(engine, session.request(max_tokens=9))
    assert shared.reuse is not None
    assert own.reuse is not None
    assert (shared.reuse.reused, own.reuse.reused) == (0, 305)
    # the mark stays, also where the arithmetic is the first one's again
    monkeypatch.setattr(fingerprint, "arithmetic", lambda model: here)
    session.save(tmp_path / "two")
    with pytest.raises(DataError, match="inexact is True there, False here"):
        engine.restore(tmp_path / "two")
    assert not engine.restore(tmp_path / "two", inexact=True).exact


def test_one_flipped_bit_anywhere_is_refused(build: Build, tmp_path: Path) -> None:
    model, path = build(), tmp_path / "one"
    saved(model, path)
    whole, rng = path.read_bytes(), Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 9), *(rng.randrange(header, len(whole)) for _ in range(100)), len(whole) - 1]
    engine = Engine(model, config=SMALL)
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"^\S*one: "):
            engine.restore(path)
    for length in (0, 7, 8, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"^\S*one: "):
            engine.restore(path)
    check_conserved(engine)
    assert not engine.memory.prefixes.snapshots
    path.write_bytes(whole)
    assert engine.restore(path).places == [200, 300, 305]


def test_damage_is_named(build: Build, tmp_path: Path) -> None:
    model, path = build(), tmp_path / "one"
    saved(model, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    offsets = json.loads(whole[8:header])["pages.2.values"]["data_offsets"]
    broken = bytearray(whole)
    broken[header + offsets[0] + 5] ^= 4
    path.write_bytes(broken)
    with pytest.raises(DataError, match=r"one: pages.2.values is damaged, its digest differs; take an older copy$"):
        Engine(model, config=SMALL).restore(path)


def test_a_file_is_not_there_or_something_else(build: Build, tmp_path: Path) -> None:
    engine = Engine(build(), config=SMALL)
    with pytest.raises(DataError, match=r"none: no such session; name one that was saved$"):
        engine.restore(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match=r"text: must be a whole session file; got"):
        engine.restore(tmp_path / "text")
    with pytest.raises(DataError, match=r"must be a whole session file; got"):
        engine.restore(tmp_path)


@pytest.mark.parametrize("inexact", [False, True])
def test_a_session_of_another_version_is_refused_by_name(build: Build, tmp_path: Path, *, inexact: bool) -> None:
    model, path = build(), tmp_path / "one"
    saved(model, path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    others = (
        ({"format": "nemotron_h session 1"}, "'nemotron_h session 1'"),
        ({"prompt_tokens": None}, "fields that are not of it"),
    )
    for changed, got in others:
        text = json.dumps(json.loads(metadata["session"]) | changed)
        save_file(tensors, path, {"session": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
        rule = rf"one: must be 'nemotron_h session 2'; got {got}; go on with it in the version that saved it$"
        with pytest.raises(DataError, match=rule):
            Engine(model, config=SMALL).restore(path, inexact=inexact)


def test_a_session_that_does_not_fit_is_refused(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    saved(model, tmp_path / "one")
    engine = Engine(model, config=replace(SMALL, max_running=1, memory_bytes=245_000, pages_fraction=0.4))
    with pytest.raises(CapacityError, match=r"^session: needs 2 pages of 256 tokens; 1 are free"):
        engine.restore(tmp_path / "one")
    check_conserved(engine)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(
        CapacityError, match=r"two: needs [\d,]+ bytes of disk; 1,000 are free; free some or save elsewhere"
    ):
        saved(model, tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_states_of_other_weights_are_not_saved(build: Build, tmp_path: Path) -> None:
    """Weights that change between an answer and its file, with no step between."""
    model = build()
    engine = Engine(model, config=SMALL)
    (answer,) = answered(engine, REQUEST)
    before = engine.session(answer)
    assert before.places
    with torch.no_grad():
        model.head_weight.mul_(2)
    assert before.places == []
    before.save(tmp_path / "before")
    engine.session(answer).save(tmp_path / "after")
    for name in ("before", "after"):
        session = Engine(model, config=SMALL).restore(tmp_path / name)
        assert session.ids == [*REQUEST.ids, *answer.ids]
        assert session.places == []


def test_where_one_arithmetic_does_not_hold_a_session_holds_whole_portions(build: Build, tmp_path: Path) -> None:
    model, inexact = build(), Arithmetic(False, 4, ("rows of 96 x 32",), 0.0)
    engine = Engine(model, config=SMALL, arithmetic=inexact)
    (answer,) = answered(engine, replace(REQUEST, boundaries=[]))
    session = engine.session(answer)
    assert session.places == [96, 192, 288]
    session.save(tmp_path / "one")
    again = Engine(model, config=SMALL, arithmetic=inexact)
    assert again.restore(tmp_path / "one").places == [96, 192, 288]
    (other,) = answered(again, replace(REQUEST, boundaries=[]))
    assert other.reuse is not None
    assert other.reuse.reused == 288
