"""The verbs together, and the one place where an error becomes a line and an exit code.

Exit codes: 0 done, 1 our fault or nobody reads our output, 2 the user's, 130 and 143 interrupted and terminated.
"""

import gc
import logging
import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer

from nemotron_h import __version__
from nemotron_h.cli.bench import bench
from nemotron_h.cli.chat import chat
from nemotron_h.cli.convert import convert
from nemotron_h.cli.generate import generate
from nemotron_h.cli.ls import ls
from nemotron_h.cli.plan import plan
from nemotron_h.cli.pull import pull
from nemotron_h.cli.quantize import quantize
from nemotron_h.cli.run import run
from nemotron_h.cli.show import show
from nemotron_h.cli.train import train
from nemotron_h.cli.verify import verify
from nemotron_h.errors import NemotronError

DEBUG = "--debug"
UsageError: type[Any] = typer.BadParameter.__bases__[0]  # of any fault in a command line; typer exports some of them

app = typer.Typer(
    name="nemotron-h",
    help="Nemotron-H hybrid Mamba-2/Transformer language models: train, look into, and write with them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (run, train, generate, chat, show, verify, pull, ls, convert, quantize, bench, plan):
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
    # what torch and the kernels' compiler make stays: to look it through again and again takes a tenth of a start
    gc.set_threshold(100_000)
    arguments, debug = without_debug(sys.argv[1:])
    logging.basicConfig(format="note: %(message)s")
    logging.getLogger("nemotron_h").setLevel(logging.INFO)
    warnings.showwarning = lambda message, *rest, **more: print(f"note: {message}", file=sys.stderr)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a letter of the text gets "?"
    try:
        try:
            code = app(arguments or ["--help"], prog_name="nemotron-h", standalone_mode=False)
        finally:
            sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the last flush of Python complains
        sys.exit(1)
    except Exception as error:  # the outermost loop: whatever it is, said in a line
        leave(*told(error), debug=debug)


def told(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, NemotronError):
        return str(error), 2
    if isinstance(error, UsageError):
        return f"{error.format_message().rstrip('.')}; --help shows the usage", 2
    # Python's own, and torch's of a CPU and of a GPU, which have no class in common
    if isinstance(error, MemoryError) or any(words in str(error) for words in ("allocate memory", "out of memory")):
        return f"memory: ran out; ask for less, such as a smaller model or batch; {DEBUG} shows where", 2
    if isinstance(error, OSError):  # a full disk, a folder that may not be written
        return f"{error.filename or 'output'}: {error.strerror or error}", 2
    return f"internal error: {type(error).__name__}: {error}; {DEBUG} shows where", 1


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
