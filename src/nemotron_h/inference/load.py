"""The public way in: `load(path)` gives all that a checkpoint folder holds, with `generate` and `save`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nemotron_h.checkpoint.companions import Companions, end_ids, read_companions
from nemotron_h.checkpoint.load import checkpoint_folder
from nemotron_h.checkpoint.load import load as load_model
from nemotron_h.checkpoint.save import save as save_model
from nemotron_h.config.published import Dialect
from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import RequestError
from nemotron_h.inference import naive
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.text.stream import StopStrings, TextStream
from nemotron_h.text.tokenizer import TOKENIZER_FILE, Tokenizer, check_fits

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LanguageModel:
    """A model, its tokenizer, and what lies beside them in a checkpoint; tokenizer None: ids in, ids out.

    Where no sampling is given, tokens are drawn as the checkpoint's own defaults say; where it has none, the likeliest.
    Raises: CheckpointError where the tokenizer has ids that the model has not, ConfigError where an end token is none.
    """

    model: Hybrid
    tokenizer: Tokenizer | None
    companions: Companions = field(default_factory=Companions)

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            check_fits(self.tokenizer, self.model.config.vocab_size)
        end_ids(self.companions.generation, self.model.config, self.tokenizer)

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
    ) -> str:
        """The text that follows prompt, without it. It ends at an end token, at a stop string, or after max_tokens.

        temperature, top_k, top_p: None takes the checkpoint's default.
        """
        defaults = self.companions.generation
        sampling = defaults.sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return "".join(self.stream(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, ignore_end=ignore_end))

    def stream(
        self,
        prompt: str,
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
    ) -> Iterator[str]:
        """The same text as it comes, in whole characters. ignore_end: go on after an end token.

        A vocabulary may be padded beyond the tokenizer's, and that may have holes: ids that stand for no text are never
        drawn.
        """
        tokenizer = self._tokenizer()
        stops, text = StopStrings([stop] if isinstance(stop, str) else stop), TextStream(tokenizer)
        new = naive.tokens(
            self.model,
            self.prompt_ids(prompt),
            max_tokens=max_tokens,
            sampling=self._sampling(sampling),
            ends=self._ends(ignore_end),
            drawn_from=tokenizer.known_ids,
        )
        return _pieces(new, text, stops)

    def tokens(
        self, ids: Sequence[int], *, max_tokens: int = 128, sampling: Sampling | None = None, ignore_end: bool = False
    ) -> Iterator[int]:
        """The tokens that follow ids, one by one, of the model's whole vocabulary."""
        ends, sampling = self._ends(ignore_end), self._sampling(sampling)
        return naive.tokens(self.model, ids, max_tokens=max_tokens, sampling=sampling, ends=ends)

    def prompt_ids(self, prompt: str) -> list[int]:
        """A prompt as the model was trained to read one: its documents begin with the begin-of-text token."""
        return [self.model.config.bos_token_id, *self._tokenizer().encode(prompt)]

    def save(
        self,
        folder: str | Path,
        *,
        made_by: str = "nemotron_h.LanguageModel.save",
        dialect: Dialect = Dialect.PUBLISHED,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Write a new checkpoint folder with all that this one holds. dtype: of the weights.

        Raises: CheckpointError where the folder exists, CapacityError where the disk is too small.
        """
        save_model(
            self.model,
            folder,
            tokenizer=self.tokenizer,
            companions=self.companions,
            made_by=made_by,
            dialect=dialect,
            dtype=dtype,
        )

    def _ends(self, ignored: bool) -> tuple[int, ...]:
        return () if ignored else end_ids(self.companions.generation, self.model.config, self.tokenizer)

    def _sampling(self, given: Sampling | None) -> Sampling:
        return self.companions.generation.sampling() if given is None else given

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"prompt: needs a {TOKENIZER_FILE} in the checkpoint folder; got none; give token ids")
        return self.tokenizer


def _pieces(new: Iterator[int], text: TextStream, stops: StopStrings) -> Iterator[str]:
    for token in new:
        yield stops.push(text.push(token))
        if stops.found is not None:
            return
    yield stops.push(text.finish())
    yield stops.finish()


def load(path: str | Path, *, precision: str = "bfloat16") -> LanguageModel:
    """What a checkpoint folder holds. precision: bfloat16 or float32, of weights and products.

    Raises: CheckpointError, ConfigError or UnsupportedError in one line.
    """
    if precision not in PRECISIONS:
        raise RequestError(f"precision: must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    folder = checkpoint_folder(path)
    model = load_model(folder, dtype=PRECISIONS[precision])
    tokenizer = Tokenizer.load(folder) if (folder / TOKENIZER_FILE).exists() else None
    return LanguageModel(model, tokenizer, read_companions(folder))
