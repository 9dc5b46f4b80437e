"""One pass: the calls of the model that read so many tokens of each running sequence, and drafts after them."""

from collections.abc import Sequence as Sequence_

import torch

from nemotron_h.grid import round_up
from nemotron_h.inference.sequence import Sequence
from nemotron_h.model.recorded import Calls


@torch.no_grad()
def read(
    calls: Calls,
    running: Sequence_[Sequence],
    counts: Sequence_[int],
    parts: Sequence_[range],
    drafts: Sequence_[Sequence_[int]],
    multiple: int,
) -> None:
    """Read counts[row] tokens of each row of running, whose state is the same row of calls.state, with pages for them.

    parts: rows, neighbours each, that a call takes. Those at a pause, and those that have read all they have, get their
    logits. drafts: of each row, tokens that are read too, ahead of what is known; their logits go with them.
    multiple: of the rows of a call with drafts.
    """
    for rows in parts:
        part = slice(rows.start, rows.stop)
        _call(calls, rows, running[part], counts[part], drafts[part], multiple)


def _call(
    calls: Calls,
    rows: range,
    sequences: Sequence_[Sequence],
    counts: Sequence_[int],
    drafts: Sequence_[Sequence_[int]],
    multiple: int,
) -> None:
    model, state = calls.model, calls.state
    positions = state.positions[rows.start : rows.stop]
    ends = [position + count for position, count in zip(positions, counts, strict=True)]
    lengths = [count + len(draft) for count, draft in zip(counts, drafts, strict=True)]
    segments = state.segments(lengths, max(model.row_multiple, multiple if any(drafts) else 1), rows)
    tokens: list[int] = []
    wanted: list[tuple[Sequence, Sequence_[int]]] = []
    last: list[int] = []  # the rows of their last tokens, and of their drafts
    of_rows = zip(sequences, positions, ends, drafts, segments.begins, strict=True)
    for sequence, position, end, draft, begin in of_rows:
        tokens += [*sequence.tokens[position:end], *draft]
        sequence.logits, sequence.ahead = None, []
        if end == len(sequence.tokens) or end in sequence.pauses:
            wanted.append((sequence, draft))
            first = begin + end - position - 1
            last += range(first, first + 1 + len(draft))
    logits = calls(tokens, segments, rows)
    if logits is not None:
        given = iter([logits[row] for row in last])
    else:
        # filled up with copies of a row: the bits of a product need a multiple of rows
        picked = last + [0] * (round_up(max(1, len(last)), model.row_multiple) - len(last))
        part, ids = state.part(rows), torch.tensor(tokens, device=model.device)
        hidden = model.hidden(ids, segments, part, torch.tensor(picked, device=model.device))
        given = iter(model.logits(hidden) if wanted else ())
        state.follow(part, rows)
    for row, draft in zip(rows, drafts, strict=True):
        state.go_back(row, len(draft))  # until it is known to come
    for sequence, draft in wanted:
        sequence.logits = next(given)
        sequence.ahead = [(token, next(given)) for token in draft]
