"""Does one arithmetic hold here: on this machine, for this model's shapes and weights?

A token's numbers must not depend on how its prompt was cut, on who else is computed, or on whether it was read or
generated. That rests on properties of this machine's products, so it is measured, not believed. `check` reads the whole
model several times, and gives for each comparison how far it is apart: nothing, where bits are promised. `start_up`
takes seconds: the products, and one layer of each kind.
"""

import fcntl
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise, zip_longest
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from nemotron_h.config.model import AttentionConfig, LayerConfig, MambaConfig, MlpConfig
from nemotron_h.files import replacing
from nemotron_h.grid import BLOCK, CHUNK, ROWS, round_up
from nemotron_h.model import fingerprint
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.linear import Linear
from nemotron_h.model.mamba import Mamba
from nemotron_h.model.state import Paging, State
from nemotron_h.ops.conv import causal_conv
from nemotron_h.ops.jit.compiler import said_once
from nemotron_h.ops.linear import MOST_ROWS
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.ssd import ssd, ssd_recurrence
from nemotron_h.ops.steps import steps

# Where prompts are cut: at places that one arithmetic rests on, and beside them; some pieces are single tokens.
CUTS = (1, 2, 5, CHUNK - 1, CHUNK, CHUNK + 1, 200, BLOCK - 1, BLOCK, BLOCK + 1)
LENGTH = BLOCK + ROWS + 1
SINGLES = (*range(CHUNK - 2, CHUNK + 4), *range(BLOCK - 2, LENGTH))  # cuts between which tokens come one at a time
# New tokens of three sequences in each call; the second goes over the end of a chunk within one.
BATCH = ((CHUNK, CHUNK - 3, 1), (1, 1, 1), (2, 9, 3), (1, 1, 1))
# Tokens that one layer alone is read with: past the last edge that its kind knows of.
FARTHEST = {MlpConfig: MOST_ROWS + 1, MambaConfig: CHUNK + ROWS + 1, AttentionConfig: LENGTH}
SCAN_LIMIT = 1e-4  # of the largest output: float32 sums over a chunk, and decays whose exponents are rounded

MULTIPLES = (1, ROWS, 2 * ROWS, 4 * ROWS)  # of rows, the cheapest first; 1 where kernels of ours take few
FEW = (1, 12, 20, 36)  # rows that are tried, rounded up: our kernel's ways to multiply a few, and the library's own
MANY_ROWS = 512  # of the product that others are compared with
START_UP_WORK = 2**32  # multiplications of that product when a model starts: large matrices meet fewer rows
# Outputs compared at each number of rows, times the root of a row's inputs, with which rounding grows: another order of
# sums changes one bfloat16 output in thousands of 1,024 inputs, one in 50,000 of 32.
OUTPUTS = 2**21

Calls = Sequence[Sequence[int]]  # of each call, of each sequence: how many new tokens
Read = Callable[[Tensor, Segments, State], Tensor]  # new rows (tokens, ...), where they stand -> outputs (rows, ...)


@dataclass(frozen=True)
class Finding:
    """One check: what it compared, whether it holds, and its number in words."""

    what: str
    holds: bool
    number: str


@dataclass(frozen=True)
class Arithmetic:
    """Whether one arithmetic holds, with rows padded to `multiple`; where it does not, nothing may be called exact."""

    holds: bool
    multiple: int
    failures: tuple[str, ...]  # what did not hold, at smaller multiples too
    seconds: float  # that it took to find out


@torch.no_grad()
def check(model: Hybrid, seed: int = 0) -> Iterator[Finding]:
    """Each finding as it is made: the model's own matrices first, then the whole of it. Tokens are drawn from seed."""
    yield products(model, model.row_multiple)
    tokens = random_tokens(model, seed)
    whole = [model(row[None])[0] for row in tokens]

    def read(new: Tensor, segments: Segments, state: State) -> Tensor:
        return model.logits(model.hidden(new, segments, state))

    def in_calls(sequences: Tensor, calls: Calls) -> Tensor:
        state = model.empty_state(len(sequences))
        return torch.cat(read_in_calls(read, state, sequences, calls, model.row_multiple))

    yield same("logits, prompt cut in pieces", in_calls(tokens[:1], pieces(LENGTH, CUTS)), whole[0])
    yield same("logits, one token at a time", in_calls(tokens[:1], pieces(LENGTH, SINGLES)), whole[0])
    wants = [row[:length] for row, length in zip(whole, totals(BATCH), strict=True)]
    yield same("logits, in a batch", in_calls(tokens, BATCH), torch.cat(wants))
    if any(isinstance(layer, MambaConfig) for layer in model.config.layers):
        yield scan(model, tokens[0])


@torch.no_grad()
def start_up(model: Hybrid, cache: Path | None) -> Arithmetic:
    """What `find` finds, or found before on this machine for a model like this.

    cache: a JSON file of this machine's; what is damaged in it or somebody else's is ignored. None: found anew.
    """
    if cache is None:
        return find(model)
    facts = [fingerprint.basis(model), fingerprint.shape(model.config), str(model.backbone.embeddings.weight.dtype)]
    key = fingerprint.digest_of(facts)
    arithmetic = remembered(cache).get(key)
    if arithmetic is None:
        arithmetic = find(model)
        try:
            remember(cache, key, arithmetic)
        except OSError as error:
            said_once(f"{cache}: could not be written ({error.strerror}); one arithmetic is measured at each start")
    return arithmetic


def remembered(cache: Path) -> dict[str, Arithmetic]:
    """What the file holds, nothing where it is not such a file."""
    try:
        return TypeAdapter(dict[str, Arithmetic]).validate_json(cache.read_bytes(), strict=True)
    except (OSError, ValueError):
        return {}


def remember(cache: Path, key: str, arithmetic: Arithmetic) -> None:
    """Add one result to the file, which another process may be doing too. Raises: OSError."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.with_name(f".{cache.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = remembered(cache) | {key: arithmetic}
        with replacing(cache) as file:
            file.write(json.dumps({name: asdict(one) for name, one in known.items()}, indent=1).encode())


@torch.no_grad()
def find(model: Hybrid, seed: int = 0) -> Arithmetic:
    """The least of MULTIPLES at which rows of products, and one layer of each config read in several ways, keep their
    bits. The work is bounded by what is compared, not by a clock: a busy machine gives the same answer."""
    began = perf_counter()
    failures: list[str] = []
    for multiple in MULTIPLES if model.takes_any_rows else MULTIPLES[1:]:
        found = [products(model, multiple, START_UP_WORK)]
        if found[0].holds:
            found += layers(model, multiple, seed)
        failed = [finding for finding in found if not finding.holds]
        if not failed:
            return Arithmetic(True, multiple, tuple(failures), perf_counter() - began)
        failures += [f"rows in multiples of {multiple}: {finding.what}: {finding.number}" for finding in failed]
    return Arithmetic(False, ROWS, tuple(failures), perf_counter() - began)


def same(what: str, got: Tensor, want: Tensor) -> Finding:
    """Equal to the bit, or how many numbers are not and how far."""
    differ = int((got != want).sum())
    if not differ and torch.equal(got, want):
        return Finding(what, True, f"{got.numel():,} numbers, the same bits")
    far = (got.float() - want.float()).abs().max().item()
    return Finding(what, False, f"{differ:,} of {got.numel():,} numbers differ, by {far:.2g} at most")


def products(model: Hybrid, multiple: int, most_work: int | None = None) -> Finding:
    """A row of a product among the fewest rows that are ever computed, and among many, for every shape of matrix.

    most_work: multiplications of the product among many rows; None: it has MANY_ROWS.
    """
    config = model.config
    matrices: dict[tuple[int, int, str], Callable[[Tensor], Tensor]] = {}
    matrices[config.vocab_size, config.hidden_size, ""] = model.logits
    for module in model.matrices.values():
        matrices.setdefault((*module.shape, "" if isinstance(module, Linear) else fingerprint.how(module)), module)
    fewest = {ins: min(outs for outs, own, _ in matrices if own == ins) for _, ins, _ in matrices}
    differ = []
    for (outs, ins, _), product in matrices.items():
        possible = most_work // (outs * ins) if most_work is not None else MANY_ROWS
        least = round_up(FEW[-1], multiple) + 1
        rows = round_up(min(MANY_ROWS, max(possible, least)), MULTIPLES[-1])
        # our kernel's ways differ along ins alone: of those that are too large, one for each ins meets all of them
        tried = FEW if possible >= least or outs == fewest[ins] else (FEW[0], FEW[-1])
        counts = sorted({round_up(count, multiple) for count in tried})
        generator = torch.Generator().manual_seed(ins)
        failed: set[int] = set()
        for _ in range(-(-compared(ins) // (rows * outs))):
            x = torch.randn(rows, ins, generator=generator).to(model.device, model.compute_dtype)
            want = product(x)
            failed |= {count for count in counts if count not in failed and not keeps_bits(product, x, want, count)}
        differ += [f"{outs} x {ins} at {count} rows" for count in sorted(failed)]
    number = f"{len(matrices)} shapes, the same bits at any multiple of {multiple} rows"
    return Finding("rows of matrix products", not differ, ", ".join(differ) or number)


def compared(ins: int) -> int:
    """Outputs, of rows of so many inputs."""
    return round(OUTPUTS / math.sqrt(ins))


def keeps_bits(product: Callable[[Tensor], Tensor], x: Tensor, want: Tensor, count: int) -> bool:
    """Do so many rows, from places all over x (rows, ins), give what they give among all, want (rows, outs)?"""
    places = range(1, len(x) - count + 1, count + 1)[: -(-compared(x.shape[1]) // (count * want.shape[1]))]
    return all(torch.equal(product(x[at : at + count].clone()), want[at : at + count]) for at in places)


def layers(model: Hybrid, multiple: int, seed: int = 0) -> Iterator[Finding]:
    """The first layer of each config, alone, reading embedded tokens that are drawn from seed."""
    first: dict[LayerConfig, int] = {}
    for index, config in enumerate(model.config.layers):
        first.setdefault(config, index)
    embedded = F.embedding(random_tokens(model, seed), model.backbone.embeddings.weight).to(model.compute_dtype)
    for index in first.values():
        yield from layer_findings(model, index, embedded, multiple)


def layer_findings(model: Hybrid, index: int, embedded: Tensor, multiple: int) -> Iterator[Finding]:
    """One layer's outputs and states in pieces and in a batch, against those of each sequence read at once.

    embedded: (3, LENGTH, hidden).
    """
    layer, config = model.layers[index], model.config.layers[index]
    alone = replace(model.config, layers=(config,))

    def read(new: Tensor, segments: Segments, state: State) -> Tensor:
        rows = F.pad(new, (0, 0, 0, segments.rows - segments.tokens))
        out: Tensor = layer(rows, segments, state.layers[0], Paging.of(state.tables, segments))
        state.advance(segments)
        return out

    def in_calls(sequences: Tensor, calls: Calls) -> tuple[list[Tensor], State]:
        dtype, keys_values = model.compute_dtype, model.keys_values
        state = State.zeros(alone, len(sequences), dtype=dtype, keys_values=keys_values, device=embedded.device)
        return read_in_calls(read, state, sequences, calls, multiple), state

    ways: dict[str, Calls] = {"in pieces": pieces(FARTHEST[type(config)], CUTS), "in a batch": BATCH}
    if isinstance(config, MlpConfig):
        del ways["in a batch"]  # its rows know of no sequence
    lengths = [max(of_ways) for of_ways in zip_longest(*map(totals, ways.values()), fillvalue=0)]
    wholes = [in_calls(row[None, :length], [[length]]) for row, length in zip(embedded, lengths, strict=False)]
    for way, calls in ways.items():
        what = f"{type(layer.mixer).__name__} of layer {index}, {way}"
        got, state = in_calls(embedded[: len(calls[0])], calls)
        wants = [want[: len(own)] for own, ((want,), _) in zip(got, wholes, strict=False)]
        yield same(f"{what}, outputs", torch.cat(got), torch.cat(wants))
        for place, position in enumerate(state.positions):
            after = wholes[place][1]
            if state.layers[0] is not None and after.positions == [position]:
                yield same(f"{what}, state", contents(state.select([place])), contents(after.copy()))


def contents(state: State) -> Tensor:
    """All numbers of a state of one sequence, float32 in one line."""
    parts = [layer for layer in state.layers if layer is not None]
    return torch.cat([getattr(part, field.name).float().flatten() for part in parts for field in fields(part)])


def random_tokens(model: Hybrid, seed: int) -> Tensor:
    """(3, LENGTH) int64."""
    tokens = torch.randint(model.config.vocab_size, (3, LENGTH), generator=torch.Generator().manual_seed(seed))
    return tokens.to(model.device)


def totals(calls: Calls) -> list[int]:
    """Tokens of each sequence in all calls together."""
    return [sum(lengths) for lengths in zip(*calls, strict=True)]


def pieces(length: int, edges: Sequence[int]) -> Calls:
    """The calls that read one sequence of that length, cut at the edges that lie within it."""
    cuts = sorted({0, length, *(edge for edge in edges if edge < length)})
    return [(after - before,) for before, after in pairwise(cuts)]


def read_in_calls(read: Read, state: State, sequences: Tensor, calls: Calls, multiple: int) -> list[Tensor]:
    """Each sequence's outputs, of sequences (s, l, ...) whose rows are given to the calls in order."""
    done = [0] * len(sequences)
    parts: list[list[Tensor]] = [[] for _ in sequences]
    for lengths in calls:
        segments = state.segments(lengths, multiple)
        new = [row[at : at + count] for row, at, count in zip(sequences, done, lengths, strict=True)]
        out = read(torch.cat(new), segments, state)
        for index, (begin, count) in enumerate(zip(segments.begins, lengths, strict=True)):
            parts[index].append(out[begin : begin + count])
            done[index] += count
    return [torch.cat(own) for own in parts]


def scan(model: Hybrid, tokens: Tensor) -> Finding:
    """The first Mamba layer's chunked scan of these tokens against the recurrence in float64."""
    norm, mixer = next((layer.norm, layer.mixer) for layer in model.layers if isinstance(layer.mixer, Mamba))
    config, segments = mixer.config, Segments((0,), (len(tokens),))
    h, p, g, n = config.num_heads, config.head_dim, config.num_groups, config.state_size
    rows = torch.nn.functional.pad(tokens, (0, segments.rows - segments.tokens))
    u = norm(model.backbone.embeddings.weight[rows].to(model.compute_dtype))
    _, xbc, raw = mixer.in_proj(u).split([config.inner_size, config.conv_channels, h], dim=-1)
    taps, bias = mixer.conv1d.weight.to(u.dtype), mixer.conv1d.bias.to(u.dtype)
    inputs = causal_conv(xbc, taps, bias, segments, None)
    A = -torch.exp(mixer.A_log)
    dt, a = steps(raw, mixer.dt_bias, A, config.time_step_limit, segments, None)
    got = ssd(inputs, dt, a, mixer.D, segments, None, num_groups=g, state_size=n)

    x, B, C = inputs[: len(tokens)].double().split([config.inner_size, g * n, g * n], dim=-1)
    x, B, C = x.view(1, -1, h, p), B.view(1, -1, g, n), C.view(1, -1, g, n)
    taken = segments.collect(dt.transpose(1, 2))[None, : len(tokens)].double()
    want, _ = ssd_recurrence(x, taken, A.double(), B, C, x.new_zeros(1, h, p, n))
    want = (want + mixer.D.double()[:, None] * x).view(len(tokens), -1)
    far = ((got[: len(tokens)] - want).abs().max() / want.abs().max()).item()
    return Finding("chunked scan against the float64 recurrence", far <= SCAN_LIMIT, f"{far:.1e} of the largest output")
