"""`nemotron-h convert`: the same weights in the words of either dialect."""

from typing import Annotated

import typer

from nemotron_h.config.published import Dialect

HELP_TO = "published: NVIDIA's names and config.json; transformers: those of transformers 5."


def convert(
    path: Annotated[str, typer.Argument(help="A checkpoint folder, or org/name[@revision] on the Hub.")],
    to: Annotated[Dialect, typer.Option(help=HELP_TO)],
    out: Annotated[
        str | None, typer.Option(help="The folder to write, by default PATH's name and the dialect.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="bfloat16 or float32; by default as stored, quantised weights decoded to bfloat16."),
    ] = None,
) -> None:
    """Write a checkpoint anew in either dialect, with all that lies beside its weights."""
    from pathlib import Path

    import torch

    from nemotron_h.checkpoint.card import parent_name
    from nemotron_h.checkpoint.load import checkpoint_folder, widest_dtype
    from nemotron_h.cli.pull import folder_of
    from nemotron_h.errors import RequestError
    from nemotron_h.inference.load import PRECISIONS, read

    folder = checkpoint_folder(folder_of(path))
    target = Path(out if out is not None else f"{Path(parent_name(folder)).name}-{to}")
    stored = widest_dtype(folder)
    if precision is None and stored == torch.float64:
        raise RequestError(f"precision: must be given; the weights in {folder} are float64, which is not kept")
    given = precision or ("bfloat16" if stored == torch.bfloat16 else "float32")
    if given not in PRECISIONS:
        raise RequestError(f"precision: must be one of {', '.join(PRECISIONS)}; got {given!r}")
    model = read(folder, dtype=PRECISIONS[given])
    dtype = PRECISIONS[given] if precision is not None else stored
    model.save(target, dialect=to, dtype=dtype, made_by=f"nemotron-h convert {path} --to {to}")
    print(target)
