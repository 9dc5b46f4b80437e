"""A model's matrices put into integers, layer by layer, as text runs through it.

Each layer reads what the layers before it give as they are now, in integers, so that its matrices are rounded for the
rows that they will meet, but for what the layer's own other matrices change. Beside them the layers as they were read
the same held-out text, which tells what became of the residual stream and of the loss. A layer's plain matrices are
looked at once and let go.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron_h.data.corpus import standard_library
from nemotron_h.errors import RequestError, ShapeError
from nemotron_h.model.hybrid import Hybrid, Layer
from nemotron_h.model.linear import Linear, QuantizedLinear
from nemotron_h.model.state import Paging
from nemotron_h.ops.segments import Segments
from nemotron_h.precision.weights import BITS, HEAD, HEAD_BITS, Met, Rounded, rounded
from nemotron_h.text.tokenizer import Tokenizer

WINDOW = 512  # tokens that are read together
AT_ONCE = 4  # windows in a call

Progress = Callable[[float, str], None]  # the fraction done, and which module is at hand


@dataclass(frozen=True)
class MatrixReport:
    """One matrix: its module's name, bits of its integers and of the rows that meet it, and `Rounded`'s errors."""

    name: str
    bits: int
    row_bits: int
    weight_error: float
    row_error: float
    error: float


@dataclass(frozen=True)
class Report:
    """What quantising did. stream_errors: after each layer, how far the residual stream of held-out text is from the
    one before, over its norm. Losses in nats a token on that text; None where there was none."""

    precision: str
    matrices: tuple[MatrixReport, ...]
    stream_errors: tuple[float, ...]
    loss_before: float | None
    loss_after: float | None
    tokens: int  # that matrices were rounded for
    held_out_tokens: int


@torch.no_grad()
def quantize(
    model: Hybrid,
    precision: str,
    text: Tensor,
    *,
    held_out: Tensor | None = None,
    feedback: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Put the matrices of a plain model into integers, in place. precision: one of BITS.

    text, held_out: (windows, length) int64. feedback: round with error feedback on text, which takes minutes.
    Raises: RequestError where the model is not plain, and for the first matrix whose weights or rows are no finite
    numbers; the model is then half of each, and no use.
    """
    if any(not isinstance(one, Linear) or one.packed for one in model.matrices.values()):
        raise RequestError("model: must be plain, to be quantised; it is packed or quantised already; load it anew")
    tell = progress or (lambda done, what: None)
    sizes = {name: math.prod(one.shape) for name, one in model.matrices.items()} | {
        HEAD: math.prod(model.head_weight.shape)
    }
    whole, done = sum(sizes.values()), 0
    stream = _embedded(model, text)
    now = _embedded(model, held_out) if held_out is not None else []
    before = list(now)
    matrices: list[MatrixReport] = []
    errors: list[float] = []

    def put(name: str, weight: Tensor, bits: int, met: Met) -> None:
        nonlocal done
        tell(done / whole, name)
        try:
            found = rounded(weight, bits, met)
        except ShapeError as error:
            raise RequestError(f"{name}.{error}") from None
        model.put(name, QuantizedLinear.of(found.matrix, found.row_bits))
        matrices.append(_report(name, bits, found))
        done += sizes[name]

    for index, layer in enumerate(model.layers):
        inside = f"backbone.layers.{index}."
        own = {name: one for name, one in model.matrices.items() if name.startswith(inside)}
        _read(layer, before)
        with meeting(own, products=feedback) as met:
            for x, segments in stream:  # what it gives is not kept: the layer is not yet as it will be
                layer(x, segments, None, Paging.alone(segments))
        for name, one in own.items():
            put(name, one.get_parameter("weight"), BITS[precision], met[name])
        _read(layer, stream)
        _read(layer, now)
        if now:
            errors.append(_far(now, before))
    head_met = Met(products=feedback)
    for x, _ in stream:
        head_met.add(model.backbone.norm_f(x))
    loss_before = _loss(model, before, held_out) if held_out is not None else None
    put(HEAD, model.head_weight, HEAD_BITS, head_met)
    loss_after = _loss(model, now, held_out) if held_out is not None else None
    tell(1.0, "")
    tokens = (text.numel(), held_out.numel() if held_out is not None else 0)
    return Report(precision, tuple(matrices), tuple(errors), loss_before, loss_after, *tokens)


def windows(tokenizer: Tokenizer | None, model: Hybrid, count: int, text: str | None = None, seed: int = 0) -> Tensor:
    """(count, WINDOW) tokens to run through a model: of a text, of Python's own library where there is none, or drawn
    from seed where there is no tokenizer. Fewer where the text is short.

    Raises: RequestError where it does not fill one.
    """
    begin, body = model.config.bos_token_id, WINDOW - 1
    if tokenizer is None:
        if text is not None:
            raise RequestError("text: needs a tokenizer in the checkpoint folder, and it has none; leave it out")
        drawn = torch.randint(model.config.vocab_size, (count, body), generator=torch.Generator().manual_seed(seed))
        return F.pad(drawn, (1, 0), value=begin)
    ids: list[int] = []
    for part in _library() if text is None else [text]:
        ids += tokenizer.encode(part)
        if len(ids) >= count * body:
            break
    full = min(count, len(ids) // body)
    if full == 0:
        missing = "" if text is not None else "; Python's own library has no source files here: give a text"
        raise RequestError(f"text: must have {body} tokens or more; got {len(ids)}{missing}")
    return F.pad(torch.tensor(ids[: full * body]).view(full, body), (1, 0), value=begin)


def _library() -> Iterator[str]:
    """Texts of Python's own library, in an order that mixes its subjects and is the same each time."""
    paths = sorted(standard_library().glob("*.py"), key=lambda path: zlib.crc32(path.name.encode()))
    for path in paths:
        yield path.read_text(encoding="utf-8", errors="ignore")


Stream = list[tuple[Tensor, Segments]]  # the residual stream, (rows, hidden), of some windows each


def _embedded(model: Hybrid, tokens: Tensor) -> Stream:
    stream = []
    for some in tokens.to(model.device).split(AT_ONCE):
        segments = model.segments(some)
        ids = F.pad(some.flatten(), (0, segments.rows - segments.tokens))
        stream.append((F.embedding(ids, model.backbone.embeddings.weight).to(model.compute_dtype), segments))
    return stream


def _read(layer: Layer, stream: Stream) -> None:
    """The stream after a layer, in place of that before it."""
    stream[:] = [(layer(x, segments, None, Paging.alone(segments)), segments) for x, segments in stream]


@contextmanager
def meeting(modules: Mapping[str, nn.Module], *, products: bool) -> Iterator[dict[str, Met]]:
    """What rows meet each of the modules in the meantime."""
    met = {name: Met(products=products) for name in modules}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, own=met[name]: own.add(given[0]))
        for name, module in modules.items()
    ]
    try:
        yield met
    finally:
        for hook in hooks:
            hook.remove()


def _far(now: Stream, before: Stream) -> float:
    apart = sum((a.float() - b.float()).square().sum().item() for (a, _), (b, _) in zip(now, before, strict=True))
    whole = sum(b.float().square().sum().item() for b, _ in before)
    return math.sqrt(apart / whole) if whole else 0.0


def _loss(model: Hybrid, stream: Stream, tokens: Tensor) -> float:
    """Nats a token of the windows, given the stream after the last layer."""
    total, count = 0.0, 0
    for (x, segments), some in zip(stream, tokens.split(AT_ONCE), strict=True):
        for row, begin in zip(some, segments.begins, strict=True):
            logits = model.logits(model.backbone.norm_f(x[begin : begin + len(row)]))
            total += F.cross_entropy(logits[:-1], row[1:].to(x.device), reduction="sum").item()
            count += len(row) - 1
    return total / count


def _report(name: str, bits: int, found: Rounded) -> MatrixReport:
    return MatrixReport(name, bits, found.row_bits, found.weight_error, found.row_error, found.error)
