"""The verbs together, and the one place where an error becomes a line and an exit code.

Exit codes: 0 done, 1 our fault, 2 the user's, 130 interrupted. `--debug` shows the traceback.
"""

import sys
import warnings
from typing import Annotated

import typer

from nemotron_h import __version__
from nemotron_h.cli.generate import generate
from nemotron_h.cli.run import run
from nemotron_h.cli.show import show
from nemotron_h.cli.train import train
from nemotron_h.errors import NemotronError

app = typer.Typer(
    name="nemotron-h",
    help="Nemotron-H hybrid Mamba-2/Transformer language models: train, look into, and write with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (run, train, generate, show):
    app.command()(verb)


def version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every verb."""


def main() -> None:
    """Run the command line; leave with its exit code."""
    debug = "--debug" in sys.argv
    warnings.showwarning = lambda message, *rest, **more: print(f"note: {message}", file=sys.stderr)
    try:
        app()
    except NemotronError as error:
        if debug:
            raise
        print(f"nemotron-h: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left: not an error of ours
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:  # the outermost loop: ours, said in a line
        if debug:
            raise
        print(f"nemotron-h: internal error: {type(error).__name__}: {error}; --debug shows where", file=sys.stderr)
        sys.exit(1)
