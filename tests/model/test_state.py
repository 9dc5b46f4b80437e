"""One arithmetic: logits and states have the same bits however a prompt is cut and whoever is computed beside it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_h.config import cost
from nemotron_h.config.presets import PRESETS
from nemotron_h.errors import ShapeError, UnsupportedError
from nemotron_h.grid import AHEAD, CHUNK
from nemotron_h.model.attention import Attention
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.model.mamba import Mamba
from nemotron_h.model.mlp import Mlp
from nemotron_h.model.state import AttentionState, MambaState, State
from nemotron_h.ops.segments import Segments
from tests.compare import assert_near
from tests.model.shapes import FAMILY, attention, mamba, model, random_tokens, scaled

DTYPES = [torch.float32, torch.bfloat16]
ALL = list(product(FAMILY, DTYPES, (1, 2, 3)))  # threads last
# every member, dtype and number of threads, though not each with each
SOME = [(name, dtype, 1 + index % 3) for index, (name, dtype) in enumerate(product(FAMILY, DTYPES))]


def assert_same_state(got: State, index: int, want: State, other: int = 0) -> None:
    """Sequence index of one state is sequence other of another, to the bit. Page numbers may differ."""
    assert got.positions[index] == want.positions[other]
    for number, (mine, theirs) in enumerate(zip(got.layers, want.layers, strict=True)):
        match mine, theirs:
            case MambaState(), MambaState():
                for name in ("conv", "boundary", "x", "dt", "B"):
                    assert torch.equal(getattr(mine, name)[index], getattr(theirs, name)[other]), (number, name)
            case AttentionState(), AttentionState():
                for name in ("keys", "values"):
                    pages = getattr(mine, name)[got.tables[index]], getattr(theirs, name)[want.tables[other]]
                    assert torch.equal(*pages), (number, name)
            case None, None:
                pass
            case _:
                pytest.fail(f"layer {number}: {type(mine).__name__} and {type(theirs).__name__}")


def read(net: Hybrid, state: State, sequences: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Give each sequence of the state its next tokens, a different number each. Returns each one's logits."""
    new = [s[at : at + length] for s, at, length in zip(sequences, state.positions, lengths, strict=True)]
    segments = state.segments(lengths, net.row_multiple)
    logits = net.logits(net.hidden(torch.cat(new), segments, state))
    return list(logits[: segments.tokens].split(list(lengths)))


def in_cuts(net: Hybrid, tokens: Tensor, cuts: Sequence[int]) -> tuple[Tensor, State]:
    """Tokens (1, l) in the pieces between the cuts."""
    state = net.empty_state(1)
    edges = [0, *cuts, tokens.shape[1]]
    pieces = [net(tokens[:, a:b], state) for a, b in pairwise(edges) if a < b]
    return torch.cat(pieces, dim=1), state


def check_cuts(name: str, dtype: torch.dtype, length: int, cuts: Sequence[int]) -> None:
    net, tokens = model(name, dtype), random_tokens(1, length, seed=length)
    want, state = in_cuts(net, tokens, [])
    assert torch.equal(net(tokens), want)
    got, cut_state = in_cuts(net, tokens, cuts)
    assert torch.equal(got, want)
    assert_same_state(cut_state, 0, state)


def test_rows_are_wanted_by_the_grids_multiple() -> None:
    net = deepcopy(model("8b"))
    net.row_multiple = 4
    with pytest.raises(ShapeError, match=r"^rows: must be a multiple of 4, .*; got 3$"):
        net.hidden(random_tokens(8, seed=0), Segments((0,), (8,)), rows=torch.arange(3))


def check_batch(name: str, dtype: torch.dtype, calls: Sequence[Sequence[int]]) -> None:
    """calls: of each call, the tokens each sequence is given."""
    net, totals = model(name, dtype), [sum(column) for column in zip(*calls, strict=True)]
    sequences = [random_tokens(total, seed=20 + i) for i, total in enumerate(totals)]
    state = net.empty_state(len(totals))
    logits = [read(net, state, sequences, lengths) for lengths in calls]
    for index, tokens in enumerate(sequences):
        want, alone = in_cuts(net, tokens[None], [])
        assert torch.equal(torch.cat([call[index] for call in logits]), want[0]), index
        assert_same_state(state, index, alone)


cuts_of = st.lists(st.integers(1, 299), max_size=8).map(sorted)
ragged_calls = st.integers(1, 5).flatmap(
    lambda batch: st.lists(
        st.lists(st.sampled_from([1, 1, 2, 3, 5, 7, 30, 63, 64, 65, 130]), min_size=batch, max_size=batch),
        min_size=1,
        max_size=5,
    )
)


@contextmanager
def projected_rows(net: Hybrid) -> Iterator[list[int]]:
    """How many rows the last layer's last product is given, call by call."""
    mixer, seen = net.layers[-1].mixer, list[int]()
    outs = {Mlp: "down_proj", Attention: "o_proj", Mamba: "out_proj"}
    product = getattr(mixer, outs[type(mixer)])
    hook = product.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    yield seen
    hook.remove()


@pytest.mark.parametrize("pattern", ["M-*-M-", "M-M*", "--", "*-M"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_wanted_changes_nothing_of_the_rest(pattern: str, dtype: torch.dtype) -> None:
    net = Hybrid(scaled(pattern, 48, mamba(4, 16, 16), attention(4, 2, 16), 64), dtype=dtype).requires_grad_(False)
    initialise(net, seed=3)
    for packs in (False, True):
        if packs:
            net.pack()
        whole, part = net.empty_state(2), net.empty_state(2)
        for lengths in ([70, 9], [1, 64], [3, 1]):
            segments = whole.segments(lengths)
            part.segments(lengths)
            tokens = random_tokens(sum(lengths), seed=lengths[0])
            rows = torch.arange(segments.rows - 4, segments.rows)
            want = net.hidden(tokens, segments, whole)[rows]
            with projected_rows(net) as seen:
                assert torch.equal(net.hidden(tokens, segments, part, rows), want)
            assert seen == [4]
            for index in range(2):
                assert_same_state(part, index, whole, index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILY)
@torch.no_grad()
def test_token_by_token_equals_at_once(name: str, dtype: torch.dtype) -> None:
    """Over the edges of a chunk, of two, and of an attention block."""
    check_cuts(name, dtype, length=259, cuts=[*range(1, 8), *range(60, 68), *range(125, 131), *range(253, 259)])


@pytest.mark.parametrize(("name", "dtype", "count"), SOME)
def test_cut_anywhere_equals_whole(name: str, dtype: torch.dtype, count: int, threads: Callable[[int], None]) -> None:
    @settings(max_examples=4)
    @given(cuts=cuts_of)
    @torch.no_grad()
    def check(cuts: list[int]) -> None:
        check_cuts(name, dtype, 300, cuts)

    threads(count)
    check()


@pytest.mark.parametrize(("name", "dtype", "count"), SOME)
def test_a_batch_at_different_places_equals_each_alone(
    name: str, dtype: torch.dtype, count: int, threads: Callable[[int], None]
) -> None:
    @settings(max_examples=4)
    @given(calls=ragged_calls)
    @torch.no_grad()
    def check(calls: list[list[int]]) -> None:
        check_batch(name, dtype, calls)

    threads(count)
    check_batch_edges(name, dtype)
    check()


@torch.no_grad()
def check_batch_edges(name: str, dtype: torch.dtype) -> None:
    """Sequences that end a chunk, begin one, sit inside one, cross a block, all in the same call."""
    check_batch(name, dtype, [[64, 63, 1, 255], [1, 1, 1, 1], [1, 2, 70, 3]])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "count"), ALL)
def test_many_cuts_and_batches(name: str, dtype: torch.dtype, count: int, threads: Callable[[int], None]) -> None:
    @settings(max_examples=20)
    @given(cuts=cuts_of, calls=ragged_calls)
    @torch.no_grad()
    def check(cuts: list[int], calls: list[list[int]]) -> None:
        check_cuts(name, dtype, 300, cuts)
        check_batch(name, dtype, calls)

    threads(count)
    check()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["4b", "47b", "56b", "t-8b", "ssm"])
@torch.no_grad()
def test_six_hundred_tokens_one_by_one(name: str, dtype: torch.dtype) -> None:
    check_cuts(name, dtype, 600, range(1, 600))


@torch.no_grad()
def test_a_copy_has_storage_of_its_own() -> None:
    net, tokens = model("8b"), random_tokens(2, 300, seed=30)
    state = net.empty_state(2)
    net(tokens[:, :260], state)
    copy, want = state.copy(), state.select([0, 1])
    net(tokens[:, 260:], state)
    for index in range(2):
        assert_same_state(copy, index, want, index)
    got = net(tokens[:, 260:], copy)
    assert torch.equal(got, net(tokens)[:, 260:])
    mine = {t.data_ptr() for t in tensors(state)}
    assert mine.isdisjoint(t.data_ptr() for t in tensors(copy))


@torch.no_grad()
def test_sequences_can_be_reordered_repeated_and_left_out() -> None:
    net = model("nano", torch.bfloat16)
    sequences = [random_tokens(length, seed=40 + i) for i, length in enumerate((330, 140, 90))]
    state = net.empty_state(3)
    read(net, state, sequences, [300, 70, 1])
    picked = state.select([2, 0, 0])
    assert picked.positions == [1, 300, 300]
    assert sorted(page for table in picked.tables for page in table) == list(range(5))
    chosen = [sequences[2], sequences[0], sequences[0]]
    got = read(net, picked, chosen, [80, 2, 30])
    for index, (tokens, logits) in enumerate(zip(chosen, got, strict=True)):
        whole, alone = in_cuts(net, tokens[None, : picked.positions[index]], [])
        assert torch.equal(logits, whole[0, -len(logits) :])
        assert_same_state(picked, index, alone)
    assert state.positions == [300, 70, 1]


def tensors(state: State) -> list[Tensor]:
    """Of all layers."""
    found = []
    for layer in state.layers:
        match layer:
            case MambaState():
                found += [layer.conv, layer.boundary, layer.x, layer.dt, layer.B]
            case AttentionState():
                found += [layer.keys, layer.values]
    return found


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_size_is_what_the_cost_says(name: str, dtype: torch.dtype) -> None:
    net, config = model(name, dtype), FAMILY[name]
    weights = str(dtype).removeprefix("torch.")
    state = net.empty_state(3)
    for length in (0, 300):
        if length:
            net(random_tokens(3, length, seed=50), state)
        want = cost.peak_bytes(config, length, batch=3, weights=weights)
        assert want.pop("weights") == sum(parameter.nbytes for parameter in net.parameters())
        assert state.size_bytes == sum(want.values()) == sum(t.nbytes for t in tensors(state))
    layers = [layer for layer in state.layers if isinstance(layer, MambaState)]
    assert want["recurrent state"] == sum(layer.boundary.nbytes for layer in layers)
    assert want["chunk inputs"] == sum(t.nbytes for layer in layers for t in (layer.x, layer.dt, layer.B))
    assert want["conv inputs"] + want["draft inputs"] == sum(layer.conv.nbytes for layer in layers)


@torch.no_grad()
def test_what_is_not_written_yet_is_zero() -> None:
    net = model("8b")
    state = net.empty_state(1)
    net(random_tokens(1, 70, seed=60), state)
    for layer in state.layers:
        match layer:
            case MambaState():
                assert (layer.x[:, :, 6:] == 0).all()
                assert (layer.dt[:, :, 6:] == 0).all()
                assert (layer.B[..., 6:] == 0).all()
                assert (layer.x[:, :, :6] != 0).any()
            case AttentionState():
                assert (layer.keys[..., 70:] == 0).all()
                assert (layer.keys[..., :70] != 0).any()


def test_another_number_of_sequences_is_refused() -> None:
    state = model("8b").empty_state(2)
    assert len(state) == 2
    with pytest.raises(ShapeError, match=r"^tokens: must hold one row for each sequence of the state; got 3, 2"):
        state.segments([1, 1, 1])
    with pytest.raises(ShapeError, match=r"^segments: must have lengths of 1 or more"):
        state.segments([1, 0])


@pytest.mark.parametrize("pattern", ["M-", "*-"])
def test_a_state_is_refused_where_gradients_are_wanted(pattern: str) -> None:
    whole = PRESETS["3m"]
    config = replace(whole, layers=tuple(whole.layers[whole.pattern.index(letter)] for letter in pattern))
    net = Hybrid(config)
    initialise(net, 0)
    with pytest.raises(ShapeError, match=r"^state: must be None where gradients are wanted"):
        net(torch.zeros(1, 3, dtype=torch.int64), net.empty_state(1))


def test_a_frozen_embedding_does_not_let_a_state_through() -> None:
    net = deepcopy(model("8b"))
    net.backbone.embeddings.weight.requires_grad_(False)
    with pytest.raises(ShapeError, match=r"^state: must be None where gradients are wanted"):
        net(random_tokens(1, 3, seed=0), net.empty_state(1))
    net.requires_grad_(False)
    net(random_tokens(1, 3, seed=0), net.empty_state(1))  # nothing to learn


def test_a_past_that_nobody_holds_is_refused() -> None:
    net = model("8b")
    with torch.no_grad(), pytest.raises(ShapeError, match=r"^state: must hold what lies before the tokens, .* 50$"):
        net.hidden(torch.zeros(4, dtype=torch.int64), Segments((50,), (4,), net.row_multiple))


@torch.no_grad()
def test_a_state_whose_call_was_interrupted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net, state = model("8b"), model("8b").empty_state(1)
    net(random_tokens(1, 5, seed=0), state)
    before = state.copy()

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(net.backbone.layers[-1]), "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            net(random_tokens(1, 5, seed=1), state)
    for broken in (state, state.copy()):
        with pytest.raises(ShapeError, match=r"^state: was left half-written"):
            net(random_tokens(1, 5, seed=1), broken)
    net(random_tokens(1, 5, seed=1), before)


@torch.no_grad()
def test_pages_that_somebody_hands_out_are_never_taken() -> None:
    net = model("8b")
    own = net.empty_state(1)
    net(random_tokens(1, 250, seed=0), own)
    foreign = State(own.positions, own.tables, own.layers)
    net(random_tokens(1, 6, seed=1), foreign)  # to the end of its page
    with pytest.raises(ShapeError, match=r"^tables: must have pages for the new tokens; 1 are missing"):
        net(random_tokens(1, 1, seed=2), foreign)


@torch.no_grad()
def test_an_odd_ffn_keeps_its_bits_on_three_threads(threads: Callable[[int], None]) -> None:
    threads(3)
    check_cuts("nano", torch.float32, 300, [1, 7, 299])


def test_one_key_value_head_keeps_its_bits_on_two_threads() -> None:
    """A single head is a single task: the CPU operator would multiply it by several threads, with other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            check_cuts("8b", torch.bfloat16, 600, range(1, 600))
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["8b", "47b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_keys_and_values_in_int8_keep_one_arithmetic(name: str, dtype: torch.dtype) -> None:
    """Cut or whole, remembered or not; other bits than without, and a quarter or half of the bytes."""
    net, tokens = deepcopy(model(name, dtype)), random_tokens(1, 300, seed=70)
    plain, plain_state = in_cuts(net, tokens, [])
    net.keys_values = torch.int8
    whole, state = in_cuts(net, tokens, [])
    assert torch.equal(net(tokens), whole)
    for cuts in ([1, 2, 255, 257], [64, 65, 299]):
        got, cut_state = in_cuts(net, tokens, cuts)
        assert torch.equal(got, whole)
        assert cut_state.difference(0, 0) is None
        assert_near(cut_state.saved(0)["3.scales"], state.saved(0)["3.scales"], 0)
    assert not torch.equal(whole, plain)
    assert_near(whole, plain.double(), 0.05)
    copied = State.pool(net.config, 1, 2, dtype=dtype, keys_values=torch.int8)
    copied.load(0, 300, [1, 0], state.saved(0))
    assert all(torch.equal(a, b) for a, b in zip(copied.saved(0).values(), state.saved(0).values(), strict=True))
    kept, before = (
        sum(t.nbytes for layer in some.layers if isinstance(layer, AttentionState) for t in (layer.keys, layer.values))
        for some in (state, plain_state)
    )
    assert kept * dtype.itemsize == before


def test_keys_and_values_in_another_dtype_are_refused() -> None:
    net = deepcopy(model("8b"))
    with pytest.raises(UnsupportedError, match=r"^keys_values: must be torch.int8, or None; got torch.float16$"):
        net.keys_values = torch.float16


@torch.no_grad()
def test_a_sequence_goes_back_within_its_chunk() -> None:
    """And on again: what it had read in vain has left nothing."""
    net, tokens = model("8b"), random_tokens(1, 200, seed=80)
    whole = net(tokens)
    state = net.empty_state(1)
    place, parts = 0, []
    while place < 200:
        count = min(1 + place % (AHEAD + 1), 200 - place, CHUNK - place % CHUNK)
        right = min(count, 1 + place % 3)
        given = random_tokens(1, count, seed=place)
        given[:, :right] = tokens[:, place : place + right]
        parts.append(net(given, state)[:, :right])
        state.go_back(0, count - right)
        place += right
        assert state.positions == [place]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    again = in_cuts(net, tokens, [])[1]
    both = State.pool(net.config, 2, 1, dtype=torch.float32)
    for row, one in enumerate((state, again)):
        both.load(row, 200, [0], one.saved(0))
    assert both.difference(0, 1) is None
    for count in (AHEAD + 1, -1, 9):  # 200 is 8 tokens into its chunk
        with pytest.raises(ShapeError, match=rf"^count: must be 0\.\.15, and leave .*; got {count} of 200$"):
            state.go_back(0, count)
    state.go_back(0, 2)
    state.go_on(0)
    assert state.positions == [199]
