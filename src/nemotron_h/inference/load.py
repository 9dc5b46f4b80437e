"""The public way in: `load(path)` gives all that a checkpoint folder holds, with `generate` and `save`."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemotron_h import machine
from nemotron_h.checkpoint.companions import Companions, end_ids, read_companions
from nemotron_h.checkpoint.load import check_size, widest_dtype
from nemotron_h.checkpoint.load import load as load_model
from nemotron_h.checkpoint.save import save as save_model
from nemotron_h.checkpoint.weights import Weights
from nemotron_h.config.cost import matrices, weight_bytes
from nemotron_h.config.engine import EngineConfig
from nemotron_h.config.keys import CONFIG_FILE
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.published import Dialect, read_config
from nemotron_h.config.quantization import read_quantization
from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import CapacityError, RequestError
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.partings import partings
from nemotron_h.inference.quantize import quantize, windows
from nemotron_h.inference.request import Request, Update
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.ops.jit import compiler
from nemotron_h.precision.weights import BITS
from nemotron_h.text.tokenizer import TOKENIZER_FILE, Tokenizer, check_fits

if TYPE_CHECKING:
    from nemotron_h.text.template import ChatTemplate, Message

AUTO = "auto"
KEYS_VALUES = (AUTO, "int8")
DEFAULT = EngineConfig()
LOADED_WINDOWS = 2  # of text, for what is decided of a matrix as it is rounded
LOG = logging.getLogger("nemotron_h")
PRECISIONS = machine.CANDIDATES  # of plain weights
PRECISION_NAMES = (AUTO, *PRECISIONS, *BITS)


@dataclass(frozen=True)
class LanguageModel:
    """A model, its tokenizer, and what lies beside them in a checkpoint; tokenizer None: ids in, ids out.

    Where no sampling is given, tokens are drawn as the checkpoint's own defaults say; where it has none, the likeliest.
    Raises: CheckpointError where the tokenizer has ids that the model has not, ConfigError where an end token is none.
    """

    model: Hybrid
    tokenizer: Tokenizer | None
    companions: Companions = field(default_factory=Companions)
    engine_config: EngineConfig = DEFAULT

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
        ids = self.prompt_ids(prompt)
        return self._stream(ids, max_tokens=max_tokens, sampling=sampling, stop=stop, ignore_end=ignore_end)

    def chat(
        self,
        messages: "Sequence[Message]",
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """The reply to messages, [{"role": "user", "content": "..."}, ...], as it comes: its thinking and its tool
        calls are in the text (`text/spans.py` tells them apart).

        variables: of the chat template, such as enable_thinking. Raises: RequestError for what it does not take.
        """
        ids = self.template.encode(messages, tools=tools, variables=variables, add_generation_prompt=True).ids
        boundaries = partings(self.template, messages, ids, tools=tools, variables=variables)
        return self._stream(
            ids, max_tokens=max_tokens, sampling=sampling, stop=stop, marks_visible=True, boundaries=boundaries
        )

    @cached_property
    def engine(self) -> Engine:
        """What serves this model, made at first use: what one call has read, the next one reuses."""
        return Engine(self.model, self.tokenizer, self.engine_config)

    @cached_property
    def template(self) -> "ChatTemplate":
        """The checkpoint's chat template, or the family's."""
        from nemotron_h.text.template import ChatTemplate  # noqa: PLC0415 - who does not chat does not wait for jinja2

        return ChatTemplate.of(self.companions.chat_template, self._tokenizer())

    def request(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
        **options: Any,
    ) -> Request:
        """A request to `engine`, with this checkpoint's end tokens and, where none is given, its sampling; options: the
        others of `Request`."""
        ends = () if ignore_end else end_ids(self.companions.generation, self.model.config, self.tokenizer)
        sampling = self.companions.generation.sampling() if sampling is None else sampling
        return Request(ids=ids, max_tokens=max_tokens, sampling=sampling, stop=stop, ends=ends, **options)

    def _stream(self, ids: Sequence[int], **options: Any) -> Iterator[str]:
        self._tokenizer()
        return (update.text for update in checked(self.engine.stream(self.request(ids, **options))))

    def tokens(
        self, ids: Sequence[int], *, max_tokens: int = 128, sampling: Sampling | None = None, ignore_end: bool = False
    ) -> Iterator[int]:
        """The tokens that follow ids, one by one: those that the tokenizer knows, all of the vocabulary without one."""
        request = self.request(ids, max_tokens=max_tokens, sampling=sampling, ignore_end=ignore_end)
        return (update.token for update in checked(self.engine.stream(request)) if update.token is not None)

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

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"prompt: needs a {TOKENIZER_FILE} in the checkpoint folder; got none; give token ids")
        return self.tokenizer


def checked(updates: Iterator[Update]) -> Iterator[Update]:
    """The updates of one request, an answer that ended in an error being one: RequestError."""
    for update in updates:
        yield update
        if update.answer.error is not None:
            raise RequestError(update.answer.error)


def load(
    path: str | Path,
    *,
    precision: str = AUTO,
    keys_values: str = AUTO,
    device: torch.device | str = "cpu",
    engine_config: EngineConfig = DEFAULT,
) -> LanguageModel:
    """What a checkpoint holds, ready to read and generate; its matrices are packed, and not trained any more.

    path: a folder, or as a string `org/name[@revision]` of the Hub: from the cache, else downloaded.
    precision: of weights and products, one of PRECISION_NAMES. auto: that of a folder which holds int8 or int4, else
    bfloat16, or float32 where there are no kernels and the machine is slow in it, measured. A plain folder is rounded
    to int8 or int4 as it is read, which takes some time: `nemotron-h quantize` does it once.
    keys_values: auto, as the products are, or int8: half the memory or a quarter, and rounded.
    engine_config: how it is served, memory above all.
    Raises: CheckpointError, ConfigError or UnsupportedError in one line; CapacityError where memory is too small.
    """
    check_precision(precision)
    check_keys_values(keys_values)
    device = usable(device)
    folder = located(path)
    stored = stored_precision(folder)
    check_stored(folder, stored, precision)
    chosen = stored or (precision if precision in BITS else chosen_precision(precision, device))
    check_memory(folder, needed_by(folder, device), chosen, device)
    language = read(folder, dtype=PRECISIONS.get(chosen, torch.bfloat16), device=device)
    language.model.requires_grad_(False)
    if chosen in BITS and stored is None:
        LOG.info("rounding the weights to %s; `nemotron-h quantize` does it once for all", chosen)
        if language.tokenizer is None:
            warnings.warn(f"{folder}: has no tokenizer; rows are rounded as finely as random tokens ask", stacklevel=2)
        quantize(language.model, chosen, windows(language.tokenizer, language.model, LOADED_WINDOWS))
    language.model.pack()
    language.model.keys_values = None if keys_values == AUTO else torch.int8  # weights are rounded without it
    return replace(language, engine_config=engine_config)


def read(folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> LanguageModel:
    """What a checkpoint folder holds as it lies there: a weight that is stored in dtype is mapped and never copied."""
    model = load_model(folder, dtype=dtype, device=device)
    tokenizer = Tokenizer.load(folder) if (folder / TOKENIZER_FILE).exists() else None
    return LanguageModel(model, tokenizer, read_companions(folder))


def located(path: str | Path) -> Path:
    """The folder of a path or of a name of the Hub."""
    if Path(path).exists():
        return Path(path)
    # here: who has the folder does not wait for an HTTP client
    from nemotron_h.checkpoint.download import resolve  # noqa: PLC0415

    return resolve(path)


def check_precision(precision: str) -> None:
    """Refuse one that is not known."""
    if precision not in PRECISION_NAMES:
        raise RequestError(f"precision: must be one of {', '.join(PRECISION_NAMES)}; got {precision!r}")


def check_keys_values(keys_values: str) -> None:
    """Refuse what keys and values cannot be kept in."""
    if keys_values not in KEYS_VALUES:
        raise RequestError(f"keys_values: must be one of {', '.join(KEYS_VALUES)}; got {keys_values!r}")


def check_stored(folder: Path, stored: str | None, precision: str) -> None:
    """Refuse a precision that is not the one which a folder's matrices are stored in."""
    if stored is not None and precision not in (AUTO, stored):
        raise RequestError(
            f"precision: must be {AUTO} or {stored}, in which the weights of {folder} are; got {precision!r}; "
            "load the checkpoint that it was made from"
        )


def stored_precision(folder: Path) -> str | None:
    """int8 or int4 where a folder's matrices are stored so."""
    return next(iter(BITS.keys() & read_quantization(folder)), None)


def usable(device: torch.device | str) -> torch.device:
    """The device, once it is known to be here. Raises: RequestError."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch says some of it by assert
        reason = str(error).splitlines()[0]
        raise RequestError(f"device: must be one that torch can use here; got {str(device)!r} ({reason})") from None
    if found.type not in ("cpu", "cuda"):
        raise RequestError(f"device: must be cpu or cuda; got {str(device)!r}")
    return found


@cache
def rates(device: torch.device) -> Mapping[str, float]:
    """What the device multiplies in a second, by precision: measured once a process."""
    return machine.matmul_rates(device)


def chosen_precision(asked: str, device: torch.device) -> str:
    """The precision asked for, or the better one; bfloat16 asked for by name where it is slow says by how much."""
    if asked == "float32":
        return asked
    if device.type == "cpu" and not compiler.MISSING:
        return "bfloat16"  # kernels read half the bytes, and multiply them no slower than float32
    found = rates(device)
    if asked == AUTO:
        return machine.best_precision(found)
    if asked == "bfloat16" and machine.best_precision(found) != asked:
        times = found["float32"] / found[asked]
        warnings.warn(f"bfloat16 is {times:.0f} times slower than float32 here; take precision=auto", stacklevel=3)
    return asked


def check_memory(folder: Path, needed: Mapping[str, int], chosen: str, device: torch.device) -> None:
    """Refuse what cannot fit before it is read. needed: bytes by each name of what may be chosen instead.

    Raises: CapacityError with both numbers.
    """
    if device.type == "cuda":
        available, limit = torch.cuda.mem_get_info(device)
    else:
        memory = machine.memory()
        available, limit = memory.available_bytes, memory.limit_bytes
    if needed[chosen] <= available:
        return
    fits = [name for name, size in needed.items() if size <= available]
    advice = f"{fits[0]} would fit" if fits else "nothing else would fit; take a smaller model"
    raise CapacityError(
        f"{folder}: needs {needed[chosen]:,} bytes of memory in {chosen}; {available:,} of {limit:,} are free; {advice}"
    )


def needed_by(folder: Path, device: torch.device) -> dict[str, int]:
    """Bytes to load a folder, by each precision that it can be loaded in."""
    weights, config = Weights(folder), read_config(folder / CONFIG_FILE)
    check_size(config, weights)  # of what the files cannot hold, no memory is needed
    stored = stored_precision(folder)
    if stored is not None:
        return {stored: sum(weight_bytes(config, stored).values())}
    mapped = device.type == "cpu" and widest_dtype(folder) == torch.bfloat16 and not read_quantization(folder)
    return {name: needed_bytes(config, name, mapped=mapped) for name in (*PRECISIONS, *BITS)}


def needed_bytes(config: ModelConfig, precision: str, *, mapped: bool = True) -> int:
    """To load a plain folder: all weights, and the largest of them a second time while it is laid out. mapped: are they
    read where they lie, to be rounded? Else all are held in bfloat16 before they are."""
    shapes = [shape for layer in config.layers for shape in matrices(layer, config.hidden_size)]
    largest = max(rows * columns for rows, columns in (*shapes, (config.vocab_size, config.hidden_size)))
    wide = PRECISIONS.get(precision, torch.float32).itemsize
    held = "bfloat16" if precision in BITS and not mapped else precision
    return sum(weight_bytes(config, held).values()) + largest * wide
