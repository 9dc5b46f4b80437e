"""Does one arithmetic hold here: on this machine, for this model's shapes and weights?

A token's numbers must not depend on how its prompt was cut, on who else is computed, or on whether it was read or
generated. That rests on properties of this machine's products, so it is measured, not believed. Each check gives what
was compared and how far it is apart: nothing, where bits are promised.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nemotron_h.config.model import MambaConfig
from nemotron_h.grid import BLOCK, CHUNK, ROWS
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.linear import Linear
from nemotron_h.model.mamba import Mamba
from nemotron_h.ops.conv import causal_conv
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.ssd import ssd, ssd_recurrence
from nemotron_h.ops.steps import steps

# Where prompts are cut: at places that one arithmetic rests on, and beside them.
CUTS = (1, 2, 5, CHUNK - 1, CHUNK, CHUNK + 1, 200, BLOCK - 1, BLOCK, BLOCK + 1)
LENGTH = BLOCK + ROWS + 1
SINGLES = (*range(CHUNK - 2, CHUNK + 3), *range(BLOCK - 2, LENGTH))  # tokens that are given one at a time
SCAN_LIMIT = 1e-4  # of the largest output: float32 sums over a chunk, and decays whose exponents are rounded


@dataclass(frozen=True)
class Finding:
    """One check: what it compared, whether it holds, and its number in words."""

    what: str
    holds: bool
    number: str


@torch.no_grad()
def check(model: Hybrid, seed: int = 0) -> Iterator[Finding]:
    """Each finding as it is made: the model's own matrices first, then the whole of it. Tokens are drawn from seed."""
    yield products(model)
    tokens = torch.randint(model.config.vocab_size, (3, LENGTH), generator=torch.Generator().manual_seed(seed))
    tokens = tokens.to(model.head_weight.device)
    whole = [model(row[None])[0] for row in tokens]
    yield same("logits, prompt cut in pieces", _cut(model, tokens[0], CUTS), whole[0])
    singles = [edge for place in SINGLES for edge in (place, place + 1)]
    yield same("logits, one token at a time", _cut(model, tokens[0], singles), whole[0])
    yield same("logits, in a batch", *_batch(model, tokens, whole))
    if any(isinstance(layer, MambaConfig) for layer in model.config.layers):
        yield scan(model, tokens[0])


def same(what: str, got: Tensor, want: Tensor) -> Finding:
    """Equal to the bit, or how many numbers are not and how far."""
    differ = int((got != want).sum())
    if not differ and torch.equal(got, want):
        return Finding(what, True, f"{got.numel():,} numbers, the same bits")
    far = (got - want).abs().max().item()
    return Finding(what, False, f"{differ:,} of {got.numel():,} numbers differ, by {far:.2g} at most")


def products(model: Hybrid) -> Finding:
    """A row of a product among others, and in the fewest rows that are ever computed, for every shape of matrix."""
    shapes: dict[tuple[int, ...], Linear] = {}
    for module in model.modules():
        if isinstance(module, Linear):
            shapes.setdefault(tuple(module.weight.shape), module)
    differ = []
    for (outs, into), matrix in shapes.items():
        generator = torch.Generator().manual_seed(into)
        x = torch.randn(64 * ROWS, into, generator=generator).to(matrix.weight.device, model.compute_dtype)
        want = matrix(x)
        for rows, first in ((ROWS, ROWS + 1), (2 * ROWS, 3), (3 * ROWS, 5), (16 * ROWS, 7)):
            if not torch.equal(matrix(x[first : first + rows].clone()), want[first : first + rows]):
                differ.append(f"{outs} x {into} at {rows} rows")
    number = f"{len(shapes)} shapes, the same bits at any number of rows" if not differ else ", ".join(differ)
    return Finding("rows of matrix products", not differ, number)


def _cut(model: Hybrid, tokens: Tensor, edges: Sequence[int]) -> Tensor:
    """Logits (l, vocab) of one sequence read in the pieces between the edges."""
    state = model.empty_state(1)
    cuts = sorted({0, len(tokens), *edges})
    return torch.cat([model(tokens[None, a:b], state)[0] for a, b in pairwise(cuts)])


def _batch(model: Hybrid, tokens: Tensor, whole: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Three sequences at different places, given different numbers of tokens in each call; and what each has alone."""
    state, done, parts, wants = model.empty_state(3), [0, 0, 0], [], []
    for lengths in ((CHUNK, CHUNK - 1, 1), (1, 1, 1), (2, 70, 3), (1, 1, 1)):
        segments = state.segments(lengths)
        new = [row[at : at + count] for row, at, count in zip(tokens, done, lengths, strict=True)]
        logits = model.logits(model.hidden(torch.cat(new), segments, state))
        for index, (begin, count) in enumerate(zip(segments.begins, lengths, strict=True)):
            parts.append(logits[begin : begin + count])
            wants.append(whole[index][done[index] : done[index] + count])
            done[index] += count
    return torch.cat(parts), torch.cat(wants)


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
    got, _ = ssd(inputs, dt, a, mixer.D, segments, None, num_groups=g, state_size=n)

    x, B, C = inputs[: len(tokens)].double().split([config.inner_size, g * n, g * n], dim=-1)
    x, B, C = x.view(1, -1, h, p), B.view(1, -1, g, n), C.view(1, -1, g, n)
    taken = segments.collect(dt.transpose(1, 2))[None, : len(tokens)].double()
    want, _ = ssd_recurrence(x, taken, A.double(), B, C, x.new_zeros(1, h, p, n))
    want = (want + mixer.D.double()[:, None] * x).view(len(tokens), -1)
    far = ((got[: len(tokens)] - want).abs().max() / want.abs().max()).item()
    return Finding("chunked scan against the float64 recurrence", far <= SCAN_LIMIT, f"{far:.1e} of the largest output")
