"""The checks pass where one arithmetic holds, and each turns red where it is broken."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.grid import CHUNK
from nemotron_h.model import attention, hybrid, mamba, mlp
from nemotron_h.model import check as room
from nemotron_h.model.check import Arithmetic, Finding, check, start_up
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.linear import Linear
from nemotron_h.model.state import MambaState
from nemotron_h.ops.linear import linear
from nemotron_h.ops.segments import Segments
from tests.model.shapes import FAMILY, VOCAB, model, random_tokens


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """Models this small only wait for a second thread, most of all on a busy machine."""
    threads(1)
    for name in FAMILY:  # before anything is broken, or said to be
        for dtype in (torch.float32, torch.bfloat16):
            model(name, dtype)


SCAN = "chunked scan against the float64 recurrence"


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY)
def test_every_member_passes(name: str, dtype: torch.dtype, packed: bool) -> None:
    net = deepcopy(model(name, dtype))
    if packed:
        net.pack()
    # torch multiplies bfloat16 in another way where rows x outputs x inputs are 4096 or fewer: 16 x 32 wants 16 rows
    net.row_multiple = start_up(net, None).multiple
    findings = list(check(net))
    assert [finding for finding in findings if not finding.holds] == []
    assert (SCAN in by_name(findings)) == (name != "t-8b")
    assert len(findings) == 4 + (name != "t-8b")


def test_products_that_depend_on_their_rows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Linear, x: Tensor) -> Tensor:
        return linear(x, self.weight) * (1 + 2**-20 * (len(x) % 64 == 4))

    monkeypatch.setattr(Linear, "forward", broken)
    finding = room.products(model("8b"), 4)
    assert not finding.holds
    assert "97 x 64 at 4 rows" in finding.number
    assert room.products(model("8b"), 8).holds


def test_a_rare_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In as few outputs as another order of sums changes where a row has few inputs and is rounded to bfloat16."""
    seen = 0

    def broken(self: Linear, x: Tensor) -> Tensor:
        nonlocal seen
        out = linear(x, self.weight)
        if len(x) == 8 and tuple(self.weight.shape) == (16, 64):
            seen += out.numel()
            out[0, 0] += seen % 100_000 < out.numel()
        return out

    monkeypatch.setattr(Linear, "forward", broken)
    assert "16 x 64 at 8 rows" in room.products(model("8b", torch.bfloat16), 8).number


def test_the_product_of_a_tied_head_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight) * (1 + 2**-20 * (len(x) == 12))

    monkeypatch.setattr(hybrid, "linear", broken)
    finding = room.products(model("tied"), 4)
    assert finding == Finding("rows of matrix products", False, "97 x 48 at 12 rows")


def test_logits_that_depend_on_the_cut_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Linear, x: Tensor) -> Tensor:
        few = len(x) == model("8b").row_multiple
        return linear(x, self.weight) * (1 + 2**-20 * (few and len(self.weight) == VOCAB))  # the head alone

    monkeypatch.setattr(Linear, "forward", broken)
    found = by_name(list(check(model("8b"))))
    assert found[SCAN].holds
    for what in ("logits, prompt cut in pieces", "logits, one token at a time", "logits, in a batch"):
        assert not found[what].holds, what
        assert " numbers differ, by " in found[what].number


def test_a_scan_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> Tensor:
        return mamba.ssd(*arguments, **options) * 1.001

    monkeypatch.setattr(room, "ssd", broken)
    finding = by_name(list(check(model("8b"))))[SCAN]
    assert not finding.holds
    assert finding.number == "1.0e-03 of the largest output"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["8b", "nano", "t-8b", "tied"])
def test_one_arithmetic_holds_at_start_up(name: str, dtype: torch.dtype) -> None:
    net = deepcopy(model(name, dtype))
    for _ in ("plain", "packed"):
        found = start_up(net, None)
        assert found.holds
        assert all(words.startswith(f"rows in multiples of {found.multiple // 2}: ") for words in found.failures[-1:])
        assert (found.multiple == (1 if net.takes_any_rows else 4)) == (not found.failures)
        net.pack()


@pytest.mark.parametrize("multiple", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_larger_multiple_pads_every_call_and_changes_no_bit(dtype: torch.dtype, multiple: int) -> None:
    net, tokens = deepcopy(model("nano", dtype)), random_tokens(2, 70, seed=1)
    documents = torch.tensor([[0] * 30 + [1] * 40, [2] * 69 + [3]])
    want, want_packed = net(tokens), net(tokens, documents=documents)
    net.row_multiple = multiple
    counts = []
    net.backbone.norm_f.register_forward_hook(lambda module, given, out: counts.append(len(out)))
    assert torch.equal(net(tokens), want)
    assert torch.equal(net(tokens, documents=documents), want_packed)
    state = net.empty_state(2)
    parts = [net(tokens[:, a:b], state) for a, b in ((0, 3), (3, 63), (63, 64), (64, 65), (65, 70))]
    assert torch.equal(torch.cat(parts, dim=1), want)
    assert len(counts) == 7
    assert all(count % multiple == 0 for count in counts)


def test_rows_that_are_no_multiple_are_refused() -> None:
    net = deepcopy(model("8b"))
    net.row_multiple = 8
    tokens = random_tokens(12, seed=0)
    with pytest.raises(ShapeError, match=r"^rows: must be a multiple of 8, .*; got 4$"):
        net.hidden(tokens, Segments((0,), (12,), 8), rows=torch.arange(4))
    with pytest.raises(ShapeError, match=r"^segments.rows: must be a multiple of 8, .*; got 12$"):
        net.hidden(tokens, Segments((0,), (12,)))


@pytest.mark.parametrize("multiple", [8, 16])
def test_the_least_multiple_that_holds_is_found(monkeypatch: pytest.MonkeyPatch, multiple: int) -> None:
    def broken(self: Linear, x: Tensor) -> Tensor:
        return linear(x, self.weight) * (1 + 2**-20 * (len(x) % multiple != 0))

    monkeypatch.setattr(Linear, "forward", broken)
    found = start_up(model("8b"), None)
    assert (found.holds, found.multiple, len(found.failures)) == (True, multiple, multiple // 8)
    assert found.failures[0].startswith("rows in multiples of 4: rows of matrix products: ")
    assert "97 x 64 at 12 rows" in found.failures[0]


def test_where_no_multiple_holds_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Linear, x: Tensor) -> Tensor:
        return linear(x, self.weight) * (1 + 2**-20 * (len(x) < 50))

    monkeypatch.setattr(Linear, "forward", broken)
    found = start_up(model("8b"), None)
    assert not found.holds
    assert [words.split(":")[0] for words in found.failures] == [f"rows in multiples of {m}" for m in (4, 8, 16)]


@torch.no_grad()
def failures(name: str) -> list[str]:
    net = model(name)
    return [finding.what for finding in room.layers(net, net.row_multiple) if not finding.holds]


def test_a_layer_whose_bits_depend_on_the_cut_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: Tensor, *rest: object) -> Tensor:
        return conv(inputs, *rest) * (1 + 2**-20 * (len(inputs) == few))

    conv, few = mamba.causal_conv, model("8b").row_multiple
    monkeypatch.setattr(mamba, "causal_conv", broken)
    assert "Mamba of layer 0, in pieces, outputs" in failures("8b")
    assert "Mamba of layer 0, in pieces, state" in failures("8b")
    assert start_up(model("8b"), None).multiple == 2 * few


def test_a_scan_that_is_wrong_where_a_call_goes_over_the_end_of_a_chunk_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The call of an engine that is the most common: a conversation's next turn."""

    def broken(x: Tensor, dt: Tensor, a: Tensor, D: Tensor, segments: Segments, *rest: object, **sizes: int) -> Tensor:
        calls = zip(segments.starts, segments.lengths, strict=True)
        over = any(start % CHUNK > 0 and start % CHUNK + length > CHUNK for start, length in calls)
        return scan(x, dt, a, D, segments, *rest, **sizes) * (1 + 2**-12 * over)

    scan = mamba.ssd
    monkeypatch.setattr(mamba, "ssd", broken)
    assert failures("8b") == ["Mamba of layer 0, in a batch, outputs"]


def test_a_layer_whose_bits_depend_on_the_company_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(q: Tensor, keys: Tensor, values: Tensor, segments: Segments, *rest: Any) -> Tensor:
        return attend(q, keys, values, segments, *rest) * (1 + 2**-20 * (len(segments) > 1))

    attend = attention.attention_paged
    monkeypatch.setattr(attention, "attention_paged", broken)
    assert failures("8b") == ["Attention of layer 3, in a batch, outputs"]
    found = start_up(model("8b"), None)
    assert not found.holds
    assert "rows in multiples of 16: Attention of layer 3, in a batch, outputs: " in found.failures[-1]


def test_a_state_with_other_bits_is_found_though_nothing_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: MambaState, xbc: Tensor, convolved: Tensor, dt: Tensor, segments: Segments) -> None:
        push(self, xbc, convolved, dt, segments)
        # the last call of the pieces, 65..69: the place is not written yet
        self.x[:, :, -1] += segments.starts == (65,)

    push = MambaState.push
    monkeypatch.setattr(MambaState, "push", broken)
    assert failures("8b") == ["Mamba of layer 0, in pieces, state"]


def test_a_feed_forward_layer_that_depends_on_its_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Tensor) -> Tensor:
        return activation(x) * (1 + 2**-20 * (len(x) == few))

    activation, few = mlp.relu2, model("8b").row_multiple
    monkeypatch.setattr(mlp, "relu2", broken)
    assert failures("8b") == ["Mlp of layer 1, in pieces, outputs"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "new" / "arithmetic.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Hybrid]:
    """The models that were measured, each with a result of its own."""
    models: list[Hybrid] = []

    def find(net: Hybrid) -> Arithmetic:
        models.append(net)
        return Arithmetic(len(models) % 2 == 1, 8, ("rows in multiples of 4: no",), float(len(models)))

    monkeypatch.setattr(room, "find", find)
    return models


def test_what_was_found_is_remembered_and_for_this_alone(cache: Path, measured: list[Hybrid]) -> None:
    net = deepcopy(model("8b", torch.bfloat16))
    first = start_up(net, cache)
    assert start_up(net, cache) == first
    assert start_up(deepcopy(net), cache) == first
    net.row_multiple = 8  # it is what is found
    assert start_up(net, cache) == first
    assert len(measured) == 1

    others: list[Callable[[], Hybrid]] = [
        lambda: model("4b", torch.bfloat16),
        lambda: Hybrid(replace(FAMILY["8b"], norm_epsilon=1e-6), dtype=torch.bfloat16),
        lambda: model("8b"),
        lambda: Hybrid(FAMILY["8b"], dtype=torch.float32, compute_dtype=torch.bfloat16),
        lambda: (net.pack(), net)[1],
    ]
    for count, other in enumerate(others, 2):
        assert start_up(other(), cache).seconds == count
        assert start_up(other(), cache).seconds == count
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert start_up(net, cache).seconds == 7
    finally:
        torch.set_num_threads(threads)
    assert start_up(model("8b", torch.bfloat16), cache) == first
    assert not start_up(model("4b", torch.bfloat16), cache).holds
    assert start_up(model("8b", torch.bfloat16), None).seconds == 8  # no cache


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {"holds": "yes"}}', "\x00\xff", None])
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(
    cache: Path, measured: list[Hybrid], content: str | None
) -> None:
    net = model("4b")
    first = start_up(net, cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2] if content is None else content.encode("latin-1"))
    assert start_up(net, cache).seconds == first.seconds + 1
    assert start_up(net, cache).seconds == first.seconds + 1
    assert len(json.loads(cache.read_text())) == 1
    assert len(measured) == 2


def test_writers_at_once_lose_nothing(cache: Path) -> None:
    keys = [f"{number:064}" for number in range(24)]
    result = Arithmetic(True, 4, (), 0.5)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: room.remember(cache, key, result), keys))
    assert room.remembered(cache) == dict.fromkeys(keys, result)


def test_a_folder_that_takes_no_file_is_said_once(tmp_path: Path, measured: list[Hybrid]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(
        UserWarning, match=r"arithmetic.json: could not be written \(.*\); one arithmetic is measured at"
    ):
        assert start_up(model("4b"), tmp_path / "file" / "arithmetic.json").holds
    assert len(measured) == 1
