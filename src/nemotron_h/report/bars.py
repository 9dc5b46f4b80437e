"""Bars: one for each contestant, in groups that are drawn to one scale each.

int8, prompt of 512 tokens, tokens/s
  here                    1,297  ████████████████████████████████
  llama-cpp-python q8_0     468  ███████████▌
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from nemotron_h.errors import MissingExtraError, RequestError

EIGHTHS = " ▏▎▍▌▋▊▉"
COLOURS = ("#76b900", "#9aa0a6", "#5f6368", "#c4c7cb")  # the first contestant's, then the others'


@dataclass(frozen=True)
class Group:
    """What is compared: a value of each contestant, by name, larger being better."""

    title: str
    values: dict[str, float]
    roof: float | None = None  # what the machine would allow, in the same unit


def bars(groups: Sequence[Group], *, width: int = 80) -> Text:
    """Draw them in the terminal, width characters wide. The largest value of a group fills the line; a roof above it is
    said, not drawn."""
    names = max((len(name) for group in groups for name in group.values), default=0)
    numbers = max((len(number(value)) for group in groups for value in group.values.values()), default=0)
    room = max(8, width - names - numbers - 6)
    drawn = Text()
    for group in groups:
        if drawn:
            drawn.append("\n\n")
        drawn.append(group.title, style="bold")
        if group.roof:
            share = next(iter(group.values.values())) / group.roof
            drawn.append(f"  {share:.0%} of what the machine allows", style="dim")
        most = max(group.values.values())
        for place, (name, value) in enumerate(group.values.items()):
            drawn.append(f"\n  {name:<{names}}  {number(value):>{numbers}}  ")
            drawn.append(bar(value / most * room), style="green" if place == 0 else "dim")
    return drawn


def number(value: float) -> str:
    """With four digits or more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def bar(length: float) -> str:
    """A bar of so many characters, to an eighth."""
    whole, eighths = divmod(round(8 * length), 8)
    return "█" * whole + EIGHTHS[eighths].strip()


def check_picture(path: Path) -> None:
    """Refuse what `save_bars` could not write."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError:
        raise MissingExtraError(
            "plot: must have matplotlib to be drawn; found no such package; pip install nemotron-h[eval]"
        ) from None
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise RequestError(f"plot: must be a file of one of {', '.join(sorted(kinds))}; got {path.name}")
    if not path.parent.is_dir():
        raise RequestError(f"plot: must lie in a folder that is there; got {path}")


def save_bars(groups: Sequence[Group], path: Path, *, title: str) -> None:
    """Write them as a picture, in the format that the file's name ends with.

    Raises: MissingExtraError without matplotlib; RequestError for a format that it does not write.
    """
    check_picture(path)
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    figure = Figure(figsize=(8, 1.2 + 0.5 * sum(len(group.values) + 1 for group in groups)), layout="constrained")
    ratios = [len(group.values) + 1 for group in groups]
    for group, axes in zip(
        groups, figure.subplots(len(groups), 1, squeeze=False, height_ratios=ratios)[:, 0], strict=True
    ):
        names, values = list(group.values), list(group.values.values())
        drawn = axes.barh(names, values, color=[COLOURS[min(k, len(COLOURS) - 1)] for k in range(len(names))])
        axes.bar_label(drawn, [number(value) for value in values], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(group.title, loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_visible(False)
        if group.roof:
            axes.axvline(group.roof, color="black", linestyle=":")
            below = {"xycoords": ("data", "axes fraction"), "xytext": (0, -2), "textcoords": "offset points"}
            axes.annotate("roof", (group.roof, 0), ha="center", va="top", fontsize="small", **below)
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
