"""The end of a run on the terminal: the loss curve, the baselines, what the model wrote, and what to type next."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from nemotron_h.report.curve import curve
from nemotron_h.report.table import table
from nemotron_h.training.metrics import rows


def show_summary(records: dict[str, Any], folder: Path, console: Console) -> None:
    """records: what each finished stage returned."""
    losses = [(row["step"], row["loss"]) for row in rows(folder / "training" / "metrics.jsonl")]
    if len(losses) > 1:
        console.print()
        console.print("training loss, nats per token")
        console.print(curve(losses))
    show_baselines(records, console)
    for prompt, text in records.get("samples", {}).get("texts", {}).items():
        console.rule()
        console.print(printable(prompt), style="bold", end="", markup=False, highlight=False)
        console.print(printable(text), markup=False, highlight=False)
    if "train" in records:
        console.rule()
        checkpoint = records["train"]["checkpoint"]
        # no space after "def": it would be a token of its own, after which no word of the training text follows
        following = shlex.join([typed_command(), "generate", checkpoint, "def", "--temperature", "0.7"])
        for line in (f"checkpoint: {checkpoint}", f"next:       {following}"):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def typed_command() -> str:
    """What to type for this command: its name where the shell finds it, else its path, relative where it lies below."""
    if shutil.which("nemotron-h") is not None:
        return "nemotron-h"
    path, here = Path(sys.argv[0]).absolute(), Path.cwd()
    folder = path.parent.relative_to(here) if path.is_relative_to(here) else path.parent
    return f"{folder}/{path.name}"  # ./nemotron-h where it lies right here


def show_baselines(records: dict[str, Any], console: Console) -> None:
    """The model beside what it must beat."""
    bits: dict[str, float] = dict(records.get("baselines", {}).get("bits_per_byte", {}))
    if "train" in records:
        bits["this model"] = records["train"]["bits_per_byte"]
    if not bits:
        return
    ordered = sorted(bits, key=bits.__getitem__, reverse=True)
    console.print(table([(name, bits[name]) for name in ordered], ["held-out text", "bits per byte"]))
    if "baselines" not in records:
        return
    if "train" in records:
        ratio = bits["this model"] / records["baselines"]["best_ngram"]
        word = "fewer" if ratio < 1 else "more"
        console.print(
            f"this model takes {100 * abs(1 - ratio):.1f} % {word} bits than the best n-gram", highlight=False
        )
    console.print(
        "xz after the training bytes is low where held-out files have near copies in training: "
        "its dictionary copies them, it has not learnt to predict",
        highlight=False,
    )


def printable(text: str) -> str:
    """Text that a terminal only shows: what would steer it (escapes, returns) reads as U+FFFD."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
