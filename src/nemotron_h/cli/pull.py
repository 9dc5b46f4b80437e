"""`nemotron-h pull`: a checkpoint of the Hub into the shared cache; and for every verb, where its PATH lies."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nemotron_h.checkpoint.hub import HubName


def pull(
    name: Annotated[str, typer.Argument(metavar="ORG/NAME[@REVISION]", help="A model on the Hub.")],
) -> None:
    """Download what the cache lacks of a checkpoint on the Hub, and print its folder."""
    from nemotron_h.checkpoint.hub import HubName
    from nemotron_h.errors import CheckpointError

    asked = HubName.read(name)
    if asked is None:
        raise CheckpointError(f"name: must be org/name or org/name@revision; got {name!r}")
    print(downloaded(asked))


def folder_of(path: str, *, weights: bool = True) -> Path:
    """Where a verb's PATH lies: itself where it exists, else a checkpoint of the cache, else downloaded, with a bar.

    weights: False where config and tokenizer are enough.
    """
    if Path(path).exists():  # before the imports
        return Path(path)
    from nemotron_h.checkpoint.hub import find

    found = find(path, weights=weights)
    return found if isinstance(found, Path) else downloaded(found, weights=weights)


def downloaded(name: "HubName", *, weights: bool = True) -> Path:
    """Download a checkpoint, shown on stderr: a bar on a terminal, lines elsewhere."""
    from rich.console import Console

    from nemotron_h.checkpoint.download import download
    from nemotron_h.cli.watch import Watch

    console = Console(stderr=True)
    if not console.is_terminal:
        return download(name, weights=weights)
    with Watch(console, "hub") as watch:
        return download(name, watch, weights=weights)
