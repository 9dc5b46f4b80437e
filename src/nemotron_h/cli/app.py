"""The verbs together, and the one place where an error becomes a line and an exit code.

Exit codes: 0 done, 1 our fault or nobody reads our output, 2 the user's, 130 and 143 interrupted and terminated.
"""

import ctypes
import logging
import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer

from nemotron_h import __version__
from nemotron_h.cli.generate import generate
from nemotron_h.cli.run import run
from nemotron_h.cli.show import show
from nemotron_h.cli.train import train
from nemotron_h.errors import NemotronError

DEBUG = "--debug"

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
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error; before or after a verb.")] = False,
) -> None:
    """Options of every verb."""


def main() -> None:
    """Run the command line; leave with its exit code."""
    arguments, debug = without_debug(sys.argv[1:])
    keep_freed_memory()
    logging.basicConfig(format="note: %(message)s")
    logging.getLogger("nemotron_h").setLevel(logging.INFO)
    warnings.showwarning = lambda message, *rest, **more: print(f"note: {message}", file=sys.stderr)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a letter of the text gets "?"
    try:
        try:
            app(arguments, prog_name="nemotron-h")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the last flush of Python complains
        sys.exit(1)
    except NemotronError as error:
        leave(str(error), 2, debug=debug)
    except OSError as error:  # a full disk, a folder that may not be written
        leave(f"{error.filename or 'output'}: {error.strerror or error}", 2, debug=debug)
    except Exception as error:  # the outermost loop: ours, said in a line
        leave(f"internal error: {type(error).__name__}: {error}; {DEBUG} shows where", 1, debug=debug)


def keep_freed_memory() -> None:
    """Let glibc keep what torch frees: faulting in fresh megabytes for each temporary costs more than computing it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)  # the largest that every glibc takes


def leave(line: str, code: int, *, debug: bool) -> NoReturn:
    """End with one line on stderr, or with the traceback of the error at hand."""
    if debug:
        sys.excepthook(*sys.exc_info())
    else:
        print("nemotron-h:", " ".join(line.split()), file=sys.stderr)
    sys.exit(code)


def without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments less --debug, wherever it stands before a `--`, and whether it did."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != DEBUG]
    return [*kept, *arguments[end:]], len(kept) < end
