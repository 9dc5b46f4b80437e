"""One pass: the calls of the model that read so many tokens of each running sequence."""

from collections.abc import Sequence as Sequence_

import torch

from nemotron_h.grid import round_up
from nemotron_h.inference.sequence import Sequence
from nemotron_h.model.recorded import Calls


@torch.no_grad()
def read(calls: Calls, running: Sequence_[Sequence], counts: Sequence_[int], parts: Sequence_[range]) -> None:
    """Read counts[row] tokens of each row of running, whose state is the same row of calls.state, with pages for them.

    parts: rows, neighbours each, that a call takes. Those at a pause, and those that have read all they have, get their
    logits.
    """
    for rows in parts:
        part = slice(rows.start, rows.stop)
        _call(calls, rows, running[part], counts[part])


def _call(calls: Calls, rows: range, sequences: Sequence_[Sequence], counts: Sequence_[int]) -> None:
    model, state = calls.model, calls.state
    positions = state.positions[rows.start : rows.stop]
    segments = state.segments(counts, model.row_multiple, rows)
    tokens: list[int] = []
    wanted: list[Sequence] = []
    last: list[int] = []  # the rows of their last tokens
    for index, (sequence, position, count) in enumerate(zip(sequences, positions, counts, strict=True)):
        end = position + count
        tokens += sequence.tokens[position:end]
        sequence.logits = None
        if end == len(sequence.tokens) or end in sequence.pauses:
            wanted.append(sequence)
            last.append(segments.last_rows[index])
    device = model.device
    ids = torch.tensor(tokens, device=device)
    logits = calls(ids, segments, rows)
    if logits is not None:
        for sequence, row in zip(wanted, last, strict=True):
            sequence.logits = logits[row]
        return
    # filled up with copies of a row: the bits of a product need a multiple of rows
    last += [0] * (round_up(max(1, len(last)), model.row_multiple) - len(last))
    part = state.part(rows)
    hidden = model.hidden(ids, segments, part, torch.tensor(last, device=device))
    if wanted:
        for sequence, of_row in zip(wanted, model.logits(hidden), strict=False):
            sequence.logits = of_row
    state.follow(part, rows)
