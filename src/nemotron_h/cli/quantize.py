"""`nemotron-h quantize`: a new folder with a checkpoint's matrices in int8 or int4, rounded as text meets them."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_h.config.quantization import INT4, INT8
from nemotron_h.errors import RequestError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import Tensor

    from nemotron_h.inference.load import LanguageModel

FEW, FED = 2, 64  # windows that matrices are rounded for, by default: without error feedback, and with it
HELD_OUT = 4  # so many windows to round for have one held out beside them
PRODUCTS = 5  # of x^T x in float64 that are held while it is inverted
HEAD = "head"


class Precision(StrEnum):
    """What the layers' matrices become; the head is in 8 bits in each."""

    INT8 = INT8
    INT4 = INT4


def quantize(
    path: Annotated[str, typer.Argument(help="A checkpoint folder, or org/name[@revision] on the Hub.")],
    to: Annotated[Precision, typer.Option(help="Of the layers' matrices; the head is in int8 in each.")],
    out: Annotated[
        str | None, typer.Option(help="The folder to write, by default PATH's name and the precision.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A UTF-8 file of text to round for; by default Python's own library.")
    ] = None,
    feedback: Annotated[
        bool, typer.Option("--feedback", help="Round with error feedback: nearer to the model, and takes long.")
    ] = False,
    windows: Annotated[
        int | None,
        typer.Option(help="Windows of 512 tokens to round for; some more are held out.", show_default="2; 64 fed back"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with every matrix.")] = False,
) -> None:
    """Write a checkpoint with its matrices in int8 or int4, and say how far it is from what it was.

    The folder loads mapped, in nemotron_h alone. Errors are of products, over their norm. The loss is that of text
    which the matrices were not rounded for.
    """
    if windows is not None and windows < 1:
        raise RequestError(f"windows: must be 1 or above; got {windows}")
    # after the checks: they import torch
    from rich.console import Console

    from nemotron_h.checkpoint.card import parent_name
    from nemotron_h.checkpoint.files import refuse_existing
    from nemotron_h.checkpoint.load import checkpoint_folder, refuse_integers
    from nemotron_h.cli.generate import read_prompt
    from nemotron_h.cli.process import settle
    from nemotron_h.cli.pull import folder_of

    words = read_prompt(text) if text is not None else None
    folder = checkpoint_folder(folder_of(path))
    refuse_integers(folder)
    target = Path(out if out is not None else f"{Path(parent_name(folder)).name}-{to}")
    refuse_existing(target, "folder")
    settle()
    given = {"--feedback": "" if feedback else None, "--text": text, "--windows": windows}
    options = [f" {name} {value}".rstrip() for name, value in given.items() if value is not None]
    command = f"nemotron-h quantize {path} --to {to}" + "".join(options)
    found = written(folder, target, to, words, feedback=feedback, windows=windows, made_by=command)
    if as_json:
        print(json.dumps(found))
        return
    console = Console()
    for part in drawn(found):
        console.print(part, highlight=False)
    print(target)


def written(
    folder: Path, target: Path, to: Precision, text: str | None, *, feedback: bool, windows: int | None, made_by: str
) -> dict[str, Any]:
    """Write the folder, a bar on a terminal. Returns: all that is told of it, as JSON has it."""
    import torch
    from rich.console import Console

    from nemotron_h.checkpoint.weights import Weights
    from nemotron_h.cli.watch import Watch
    from nemotron_h.inference.load import read
    from nemotron_h.inference.quantize import quantize

    check_room(folder, to, feedback=feedback)
    language = read(folder, dtype=torch.bfloat16)
    rounded_for, held_out = parted(language, text, windows, feedback=feedback)
    with Watch(Console(stderr=True), to) as watch:
        if language.tokenizer is None:
            watch.say("no tokenizer in the folder: tokens are drawn at random, and their loss says little")
        report = quantize(
            language.model, to, rounded_for, held_out=held_out, feedback=feedback, progress=watch.fraction
        )
        language.save(target, made_by=made_by)
        seconds = watch.seconds
    values = asdict(report)
    matrices = [
        {"name": one["name"], **placed(one["name"], language.model.config.pattern), **one}
        for one in values.pop("matrices")
    ]
    assert report.loss_before is not None
    assert report.loss_after is not None
    return {
        "path": str(target),
        **values,
        "feedback": feedback,
        "loss_change_percent": 100 * (report.loss_after / report.loss_before - 1),
        "bits_per_weight": bits_per_weight(language),
        "bytes_before": Weights(folder).size_bytes,
        "bytes_after": Weights(target).size_bytes,
        "seconds": seconds,
        "matrices": matrices,
    }


def check_room(folder: Path, to: Precision, *, feedback: bool) -> None:
    """Refuse what does not fit into memory. Raises: CapacityError with both numbers."""
    import torch

    from nemotron_h import machine
    from nemotron_h.config.cost import matrices
    from nemotron_h.config.keys import CONFIG_FILE
    from nemotron_h.config.published import read_config
    from nemotron_h.errors import CapacityError
    from nemotron_h.inference.load import check_memory, needed_by

    cpu = torch.device("cpu")
    every = needed_by(folder, cpu)
    check_memory(folder, {name: every[name] for name in Precision}, to, cpu)
    if not feedback:
        return
    config = read_config(folder / CONFIG_FILE)
    widest = max(ins for layer in config.layers for _, ins in matrices(layer, config.hidden_size))
    needed = every[to] + PRODUCTS * 8 * widest**2
    memory = machine.memory()
    if needed > memory.available_bytes:
        raise CapacityError(
            f"feedback: needs {needed:,} bytes of memory; {memory.available_bytes:,} of {memory.limit_bytes:,} are "
            "free; leave it out"
        )


def parted(
    language: "LanguageModel", text: str | None, windows: int | None, *, feedback: bool
) -> "tuple[Tensor, Tensor]":
    """Windows of text to round for, and those after them, held out. windows: as many, or a refusal; None takes what
    the text has, up to the default."""
    from nemotron_h.inference.quantize import WINDOW
    from nemotron_h.inference.quantize import windows as windows_of

    wanted = windows or (FED if feedback else FEW)
    held = max(FEW, wanted // HELD_OUT)
    found = windows_of(language.tokenizer, language.model, wanted + held, text)
    if len(found) < wanted + held:
        if windows is not None:
            raise RequestError(
                f"windows: must leave {held} held out of the text's {len(found)}, of {WINDOW} tokens each; got "
                f"{windows}; take fewer, or a longer text"
            )
        if len(found) == 1:
            raise RequestError(
                f"text: must fill 2 windows of {WINDOW} tokens, one to round for and one held out; got 1; take a "
                "longer text"
            )
        wanted = len(found) - max(1, len(found) // (HELD_OUT + 1))
    return found[:wanted], found[wanted:]


def bits_per_weight(language: "LanguageModel") -> float:
    """Of the matrices, the head's among them, with all that is stored beside the integers."""
    matrices = language.model.matrices.values()
    stored = sum(parameter.nbytes for one in matrices for parameter in one.parameters())
    return 8 * stored / sum(outs * ins for outs, ins in (one.shape for one in matrices))


def placed(name: str, pattern: str) -> dict[str, Any]:
    """The kind of a matrix, and its layer; the head is in none."""
    from nemotron_h.config.pattern import NAMES

    parts = name.split(".")
    if "layers" not in parts:
        return {"kind": HEAD, "layer": None}
    layer = int(parts[parts.index("layers") + 1])
    return {"kind": f"{NAMES[pattern[layer]]} {parts[-1]}", "layer": layer}


def drawn(found: dict[str, Any]) -> list["RenderableType"]:
    """The same for a person: matrices by kind, the worst first, and what became of the whole."""
    from rich.text import Text

    from nemotron_h.report.table import table
    from nemotron_h.report.units import format_bytes

    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in found["matrices"]:
        kinds.setdefault(one["kind"], []).append(one)
    rows = []
    for kind, ones in kinds.items():
        worst = max(ones, key=lambda one: one["error"])
        mean = sum(one["error"] for one in ones) / len(ones)
        row_bits = counted(one["row_bits"] for one in ones)
        rows.append((kind, len(ones), worst["bits"], row_bits, three(mean), three(worst["error"]), worst["layer"]))
    rows.sort(key=lambda row: -row[5])
    before, after = found["bytes_before"], found["bytes_after"]
    whole = [
        (
            "loss, nats a token",
            f"{found['loss_before']:.4f}",
            f"{found['loss_after']:.4f}",
            f"{found['loss_change_percent']:+.2f} %",
        ),
        ("weights on disk", format_bytes(before), format_bytes(after), f"{100 * (after / before - 1):+.1f} %"),
    ]
    errors = found["stream_errors"]
    most = max(range(len(errors)), key=errors.__getitem__)
    return [
        table(rows, ["matrices", "count", "bits", "row bits", "mean error", "worst", "layer"]),
        Text("error: of products, over their norm. row bits: of what meets the matrices.", style="dim"),
        table(whole, ["", "before", "after", "change"]),
        f"{found['bits_per_weight']:.2f} bits a weight of the matrices, the head's and all scales counted",
        f"residual stream off by {errors[-1]:.3g} after the last layer; most, {errors[most]:.3g}, after layer {most}",
        f"rounded for {found['tokens']:,} tokens{' with error feedback' if found['feedback'] else ''}; loss and stream "
        f"of {found['held_out_tokens']:,} held out",
    ]


def three(number: float) -> float:
    """In so many digits."""
    return float(f"{number:.3g}")


def counted(row_bits: Iterable[int]) -> str:
    """`8`, or `8, 16 (3)` where so many of them are otherwise than most."""
    every = list(row_bits)
    narrow, wide = every.count(8), every.count(16)
    if not narrow or not wide:
        return str(every[0])
    return f"8, 16 ({wide})" if narrow >= wide else f"16, 8 ({narrow})"
