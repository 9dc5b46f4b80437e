"""Which token comes next, from its logits: greedy, or drawn after temperature, top-k and top-p, in that order."""

from collections.abc import Iterable

import torch
from torch import Tensor

from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import RequestError


class Sampler:
    """The draws of one request: a stream of numbers of its own, independent of its neighbours."""

    def __init__(self, sampling: Sampling, drawn_from: Iterable[int] | None = None) -> None:
        """drawn_from: only these ids are drawn; None: all."""
        self.sampling = sampling
        self.allowed = None if drawn_from is None else torch.tensor(sorted(drawn_from))
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def draw(self, logits: Tensor) -> int:
        """The next token of logits (vocab,) float32. Raises: RequestError where they are not finite numbers."""
        if self.allowed is None:
            return self._place(logits)
        return int(self.allowed[self._place(logits[self.allowed])])

    def _place(self, logits: Tensor) -> int:
        """Which of these logits is drawn."""
        if not torch.isfinite(logits).all():
            raise RequestError("logits: must be finite; the model gave NaN or infinity; is the checkpoint damaged?")
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        probabilities, tokens = distribution(logits, self.sampling)
        uniform = torch.rand((), generator=self.generator, dtype=torch.float64)
        place = torch.searchsorted(probabilities.cumsum(0), uniform, right=True)
        return int(tokens[min(int(place), len(tokens) - 1)])


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities that add up to 1, likeliest first, float64, and their tokens: what is left to draw from."""
    # stable: tokens of equal logits keep their order, so a seed means the same draw everywhere
    ordered, tokens = torch.sort(logits.double().cpu(), descending=True, stable=True)
    if sampling.top_k:
        ordered, tokens = ordered[: sampling.top_k], tokens[: sampling.top_k]
    # less the largest before the division: a small temperature overflows to -inf, never to NaN
    probabilities = ((ordered - ordered[0]) / sampling.temperature).softmax(0)
    if sampling.top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        count = max(1, int((before < sampling.top_p).sum()))
        probabilities, tokens = probabilities[:count] / probabilities[:count].sum(), tokens[:count]
    return probabilities, tokens
