"""Generation as the definition reads, and as it runs: no batch, no sharing, one sequence.

`recomputed` calls the model on all tokens for each new one; `tokens` keeps a state. One arithmetic makes them equal to
the bit, at any size of the prompt's portions.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch

from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import RequestError
from nemotron_h.inference.request import check_ids, is_whole
from nemotron_h.inference.sampling import Sampler, drawable
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.state import State

PORTION = 512  # tokens of a prompt read at a time: what they need in between stays in cache, memory stays flat


def tokens(
    model: Hybrid,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    ends: Iterable[int] = (),
    drawn_from: Collection[int] | None = None,
) -> Iterator[int]:
    """New tokens one by one, at most max_tokens, up to and without one of `ends`. Checks before the first.

    drawn_from: only these ids are drawn; None: all.
    """
    check(model, prompt, max_tokens, drawn_from)
    sampler = Sampler(sampling, prompt=prompt, drawn_from=drawable(drawn_from, model.config.vocab_size))
    return (token for token, _ in draws(model, prompt, max_tokens, sampler, frozenset(ends)))


def draws(
    model: Hybrid, prompt: Sequence[int], max_tokens: int, sampler: Sampler, ends: Collection[int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each new token, and the logits (vocab,) that it was drawn from."""
    state = model.empty_state(1)
    unread = list(prompt)
    for _ in range(max_tokens):
        logits = next_logits(model, unread, state)
        token = sampler.draw(logits)
        if token in ends:
            return
        yield token, logits
        unread = [token]


@torch.no_grad()
def next_logits(model: Hybrid, unread: Sequence[int], state: State) -> torch.Tensor:
    """Logits (vocab,) after reading more tokens, in portions."""
    ids = torch.tensor(unread, dtype=torch.int64, device=model.device)
    for portion in ids.split(PORTION):
        segments = state.segments([len(portion)], model.row_multiple)
        # so many times the last row, since the product of one alone has other bits
        rows = torch.tensor(segments.last_rows * model.row_multiple, device=ids.device)
        hidden = model.hidden(portion, segments, state, rows)
    return model.logits(hidden)[0]


@torch.no_grad()
def recomputed(
    model: Hybrid,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    ends: Iterable[int] = (),
    drawn_from: Collection[int] | None = None,
) -> list[int]:
    """The same tokens from the whole sequence, read anew for each: what every faster way must equal."""
    check(model, prompt, max_tokens, drawn_from)
    sampler = Sampler(sampling, prompt=prompt, drawn_from=drawable(drawn_from, model.config.vocab_size))
    ids, ends = list(prompt), frozenset(ends)
    device = model.device
    for _ in range(max_tokens):
        token = sampler.draw(model(torch.tensor([ids], device=device))[0, -1])
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


def check(model: Hybrid, prompt: Sequence[int], max_tokens: int, drawn_from: Collection[int] | None = None) -> None:
    """Refuse what cannot be generated from, by name."""
    if not len(prompt):
        raise RequestError("ids: must hold at least one token; got none")
    vocab = model.config.vocab_size
    check_ids(prompt, vocab, "ids")
    if not is_whole(max_tokens):
        raise RequestError(f"max_tokens: must be a whole number; got {max_tokens!r}")
    if max_tokens < 1:
        raise RequestError(f"max_tokens: must be 1 or above; got {max_tokens}")
    if drawn_from is not None and not 0 <= min(drawn_from, default=-1) <= max(drawn_from, default=vocab) < vocab:
        raise RequestError(f"drawn_from: must be one id or more of 0..{vocab - 1}; got others, or none")
