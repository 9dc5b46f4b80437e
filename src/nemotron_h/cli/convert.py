"""`nemotron-h convert`: the same weights in the words of either dialect, or as one file for llama.cpp."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nemotron_h.config.gguf import GgufType
from nemotron_h.config.published import Dialect


class Target(StrEnum):
    """What is written: a folder in a dialect, or a file."""

    PUBLISHED = Dialect.PUBLISHED.value
    TRANSFORMERS = Dialect.TRANSFORMERS.value
    GGUF = "gguf"


HELP_TO = (
    "published: NVIDIA's names and config.json; transformers: those of transformers 5; gguf: one file for llama.cpp."
)


def convert(
    path: Annotated[str, typer.Argument(help="A checkpoint folder, or org/name[@revision] on the Hub.")],
    to: Annotated[Target, typer.Option(help=HELP_TO)],
    out: Annotated[
        str | None, typer.Option(help="The folder or file to write, by default PATH's name and what it becomes.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="bfloat16 or float32; by default as stored, quantised weights decoded to bfloat16."),
    ] = None,
    matrices: Annotated[
        GgufType | None, typer.Option("--type", help="Of a GGUF file's matrices; by default bf16.")
    ] = None,
    without_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="A GGUF file that takes and gives token ids alone.")
    ] = False,
) -> None:
    """Write a checkpoint anew in either dialect, with all that lies beside its weights, or as a GGUF file."""
    from nemotron_h.checkpoint.card import parent_name
    from nemotron_h.checkpoint.load import checkpoint_folder, refuse_integers
    from nemotron_h.cli.pull import folder_of
    from nemotron_h.errors import RequestError

    if to == Target.GGUF and precision is not None:
        raise RequestError(f"precision: must not be given with --to gguf; got {precision!r}; --type says it")
    for name, given in (("type", matrices), ("no-tokenizer", without_tokenizer or None)):
        if to != Target.GGUF and given is not None:
            raise RequestError(f"{name}: must be given with --to gguf only; got --to {to}")
    folder = checkpoint_folder(folder_of(path))
    refuse_integers(folder)
    name = Path(parent_name(folder)).name
    if to == Target.GGUF:
        matrices = matrices or GgufType.BF16
        target = Path(out if out is not None else f"{name}-{matrices}.gguf")
        write_file(folder, target, matrices, with_tokenizer=not without_tokenizer)
    else:
        target = Path(out if out is not None else f"{name}-{to}")
        write_folder(folder, target, Dialect(to), precision, made_by=f"nemotron-h convert {path} --to {to}")
    print(target)


def write_folder(folder: Path, target: Path, dialect: Dialect, precision: str | None, *, made_by: str) -> None:
    """precision: None keeps what is stored."""
    import torch

    from nemotron_h.checkpoint.load import widest_dtype
    from nemotron_h.errors import RequestError
    from nemotron_h.inference.load import PRECISIONS, read

    stored = widest_dtype(folder)
    if precision is None and stored == torch.float64:
        raise RequestError(f"precision: must be given; the weights in {folder} are float64, which is not kept")
    given = precision or ("bfloat16" if stored == torch.bfloat16 else "float32")
    if given not in PRECISIONS:
        raise RequestError(f"precision: must be one of {', '.join(PRECISIONS)}; got {given!r}")
    model = read(folder, dtype=PRECISIONS[given])
    dtype = PRECISIONS[given] if precision is not None else stored
    model.save(target, dialect=dialect, dtype=dtype, made_by=made_by)


def write_file(folder: Path, target: Path, matrices: GgufType, *, with_tokenizer: bool) -> None:
    """A bar on a terminal."""
    from rich.console import Console

    from nemotron_h.cli.watch import Watch
    from nemotron_h.convert.gguf import write_gguf

    with Watch(Console(stderr=True), "gguf") as watch:
        write_gguf(folder, target, matrices=matrices, with_tokenizer=with_tokenizer, progress=watch.fraction)
