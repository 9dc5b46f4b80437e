"""The end of a run on the terminal: the loss curve, the baselines, what the model wrote, and what to type next."""

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
    bits: dict[str, float] = dict(records.get("baselines", {}).get("bits_per_byte", {}))
    if "train" in records:
        bits["this model"] = records["train"]["bits_per_byte"]
    if bits:
        ordered = sorted(bits, key=bits.__getitem__, reverse=True)
        console.print(table([(name, bits[name]) for name in ordered], ["held-out text", "bits per byte"]))
    for prompt, text in records.get("samples", {}).get("texts", {}).items():
        console.rule()
        console.print(prompt, style="bold", end="", markup=False, highlight=False)
        console.print(text, markup=False, highlight=False)
    if "train" in records:
        console.rule()
        console.print(f"checkpoint: {records['train']['checkpoint']}", highlight=False, soft_wrap=True)
        console.print(
            f'next:       nemotron-h generate {records["train"]["checkpoint"]} "def " --temperature 0.7',
            highlight=False,
            soft_wrap=True,
        )
