"""One pass: the calls of the model that read so many tokens of each running sequence."""

from collections.abc import Sequence as Sequence_

import torch

from nemotron_h.grid import round_up
from nemotron_h.inference.sequence import Sequence
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.state import State


@torch.no_grad()
def read(
    model: Hybrid, state: State, running: Sequence_[Sequence], counts: Sequence_[int], calls: Sequence_[range]
) -> None:
    """Read counts[row] tokens of each row of running, whose state is the same row of state, with pages for them.

    calls: rows, neighbours each. Those at a pause, and those that have read all they have, get their logits.
    """
    for rows in calls:
        part = slice(rows.start, rows.stop)
        _call(model, state, rows, running[part], counts[part])


def _call(model: Hybrid, state: State, rows: range, sequences: Sequence_[Sequence], counts: Sequence_[int]) -> None:
    part = state.part(rows)
    segments = part.segments(counts, model.row_multiple)
    tokens: list[int] = []
    wanted: list[Sequence] = []
    last: list[int] = []  # the rows of their last tokens
    for index, (sequence, position, count) in enumerate(zip(sequences, part.positions, counts, strict=True)):
        end = position + count
        tokens += sequence.tokens[position:end]
        sequence.logits = None
        if end == len(sequence.tokens) or end in sequence.pauses:
            wanted.append(sequence)
            last.append(segments.last_rows[index])
    # filled up with copies of a row: the bits of a product need a multiple of rows
    last += [0] * (round_up(max(1, len(last)), model.row_multiple) - len(last))
    device = model.device
    hidden = model.hidden(torch.tensor(tokens, device=device), segments, part, torch.tensor(last, device=device))
    if wanted:
        for sequence, logits in zip(wanted, model.logits(hidden), strict=False):
            sequence.logits = logits
    state.follow(part, rows)
