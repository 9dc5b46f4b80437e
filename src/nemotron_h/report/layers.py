"""A model's layers in order, one letter each, in groups of ten.

       0  M-M-M-M*-M -M-M-M*-M-
    M Mamba-2 9   * attention 2   - FFN 9
    * at 7, 16

Letters say everything; colors repeat it, where the terminal has them (NO_COLOR is rich's to honour).
"""

from collections.abc import Mapping

from rich.text import Text

GROUP = 10
STYLES = ("cyan", "bold red", "yellow", "green", "magenta", "blue")


def layer_map(pattern: str, names: Mapping[str, str], *, width: int = 80, located: str = "*") -> Text:
    """Draw a pattern string.

    names: what each letter stands for, in the order of the legend.
    width: columns; what is longer continues on further lines.
    located: the letter whose positions are listed, counted from 0.
    """
    styles = dict(zip(names, STYLES, strict=False))
    gutter = len(str(max(len(pattern) - 1, 0))) + 2
    groups = max((width - gutter - 2 + 1) // (GROUP + 1), 1)
    lines = []
    for start in range(0, len(pattern), groups * GROUP):
        line = Text(f"{start:>{gutter}}  ", style="dim")
        for index, letter in enumerate(pattern[start : start + groups * GROUP]):
            line.append(" " if index and index % GROUP == 0 else "")
            line.append(letter, style=f"not dim {styles.get(letter, '')}")
        lines.append(line)
    return Text("\n").join([*lines, *_legend(pattern, names, styles, width), *_positions(pattern, located, width)])


def _legend(pattern: str, names: Mapping[str, str], styles: Mapping[str, str], width: int) -> list[Text]:
    """How many of each kind; a letter without a name stands for itself."""
    present = [*(letter for letter in names if letter in pattern), *sorted(set(pattern) - set(names))]
    entries = []
    for letter in present:
        words = [letter, names[letter]] if letter in names else [letter]
        entries.append(Text(" ".join([*words, str(pattern.count(letter))]), style=styles.get(letter, "")))
    return _wrap(entries, width, separator="   ")


def _positions(pattern: str, letter: str, width: int) -> list[Text]:
    places = [index for index, found in enumerate(pattern) if found == letter]
    if not places:
        return []
    words = [f"{letter} at {places[0]}", *(str(place) for place in places[1:])]
    return _wrap([Text(word + ("," if index < len(words) - 1 else "")) for index, word in enumerate(words)], width)


def _wrap(entries: list[Text], width: int, *, separator: str = " ") -> list[Text]:
    """Entries on as few lines as hold them; none is split."""
    lines: list[Text] = []
    for entry in entries:
        if lines and len(lines[-1]) + len(separator) + len(entry) <= width:
            lines[-1] = Text(separator).join([lines[-1], entry])
        else:
            lines.append(entry)
    return lines
