"""Measurements as files, and the documentation's numbers out of them.

    results/NAME.json     the rows of one benchmark, with the command, the commit and the machine that gave them
    <!-- results NAME --> ... <!-- end -->     in a page: a table made from it

`python benchmarks/results.py` makes every table anew. A row is what `nemotron_h.evaluate.rows.Row` has: medians of n
runs that took turns with the peer's. A file may also say on what it is based, so that a rerun goes on with it, and who
could not be asked what.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemotron_h.evaluate.rows import Row

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "results"
RACE = "benchmarks/race.py"
PART = "% of it"  # unit of a row that is part of another one
VARIABLES = ("OMP_", "ATEN_", "ONEDNN_")  # of the environment, that change how fast or in which order torch computes
BLOCK = re.compile(r"(<!-- results (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def commit() -> str:
    """What is about to be measured; to be asked before it is, for files may change meanwhile. Pages and earlier results
    may differ from what is checked in."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def sources() -> str | None:
    """What is measured, as a digest that other files' commits leave as it is; None where it is not all checked in."""
    if commit().endswith("-dirty"):
        return None
    listed = subprocess.run(["git", "ls-tree", "-r", "HEAD", "src", RACE], cwd=ROOT, capture_output=True, check=True)
    return hashlib.sha256(listed.stdout).hexdigest()[:16]


def measured(name: str, basis: Mapping[str, Any]) -> tuple[list[Row], dict[str, str]]:
    """Rows of results/NAME.json and who was absent, where they were measured on the same basis; else none."""
    path = FOLDER / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    if basis["sources"] is None or content.get("basis") != basis:
        return [], {}
    return [Row(**entry) for entry in content["rows"]], content["absent"]


def write(
    name: str,
    rows: Sequence[Row],
    commit: str,
    *,
    basis: Mapping[str, Any] | None = None,
    absent: Mapping[str, str] | None = None,
) -> Path:
    """Write results/NAME.json, and show it. commit: of what was measured."""
    import torch  # noqa: PLC0415 - making tables needs none

    from nemotron_h import machine  # noqa: PLC0415

    content = {
        "command": stated(sys.argv),
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": machine.cpu_name(),
        "cpu_features": list(machine.cpu_features()),
        "cores": machine.cores(),
        "memory_bytes": machine.memory().total_bytes,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "environment": {key: value for key, value in os.environ.items() if key.startswith(VARIABLES)},
        "basis": basis,
        "absent": absent or {},
        "rows": [asdict(entry) for entry in rows],
    }
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(table(content))
    return path


def stated(line: Sequence[str]) -> str:
    """The command, without where this machine keeps things: its paths by their last parts, an environment's Python with
    the environment's name; a cache not at all."""
    said = ["python", f"benchmarks/{Path(line[0]).name}"]
    words = [
        word for argument in line for word in (argument.split("=", 1) if argument.startswith("--") else [argument])
    ]
    for before, argument in pairwise(words):
        parts = Path(argument).parts
        if "--cache" not in (before, argument):
            said.append("/".join(parts[-3 if "bin" in parts else -2 :]) if argument.startswith("/") else argument)
    return shlex.join(said)


def table(content: dict[str, Any]) -> str:
    """A results file as Markdown: under its table, what gave it, and who is not in it."""
    rows = content["rows"]
    lines = parts_of_wholes(rows) if any(entry["unit"] == PART for entry in rows) else comparisons(rows)
    features = ", ".join(content["cpu_features"])
    lines += [
        "",
        f"{described(rows)}; `{content['command']}`, "
        f"{content['date']}, commit {content['commit']}, {content['cpu']} ({features}), {content['threads']} threads, "
        f"torch {content['torch']}.",
    ]
    reasons: dict[str, list[str]] = {}
    for who, reason in content["absent"].items():
        reasons.setdefault(reason, []).append(who)
    if reasons:
        lines.append("Not in it: " + ". ".join(f"{'; '.join(who)}: {reason}" for reason, who in reasons.items()) + ".")
    if content["command"].startswith(f"python {RACE}"):
        lines.append(cost_of_formats(rows))
    return "\n".join(lines) + "\n"


def parts_of_wholes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each whole, a column for each part: `whole: part`."""
    parts = {entry["what"].partition(": ")[::2]: entry["ours"] for entry in rows if entry["unit"] == PART}
    columns = list(dict.fromkeys(part for _, part in parts))
    lines = [f"| {' | '.join(['', 'all', *columns, 'spread'])} |", "|---" + "|---:" * (2 + len(columns)) + "|"]
    for entry in rows:
        if entry["unit"] != PART:
            whole = f"{number(entry['ours'])} {entry['unit']}"
            shares = [parts.get((entry["what"], part)) for part in columns]
            cells = ["" if share is None else f"{share:.0f} %" for share in shares]
            lines.append(f"| {' | '.join([entry['what'], whole, *cells, spread([entry])])} |")
    return lines


def comparisons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each measurement. Its peers stand in a column, or, where there are several, the best of them in one
    and the others in another."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for entry in rows:
        grouped.setdefault(f"{entry['what']}, {entry['unit']}", []).append(entry)
    peers = {entry["peer_version"] for entry in rows if entry["peer_version"]}
    beside, named = max(map(len, grouped.values())) > 1, len(peers) > 1
    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {"ours": lambda found: number(found[0]["ours"])}
    if any(entry["roof"] for entry in rows):
        columns["of the roof"] = lambda found: share(found[0])
    if peers:
        title = ("best peer" if beside else "peer") if named else next(iter(peers))
        columns[title] = lambda found: of_peer(found[0], named=named)
        columns["ratio"] = lambda found: number(found[0]["ratio"]) if found[0]["ratio"] is not None else ""
    if beside:
        columns["others: ratio"] = lambda found: "; ".join(
            f"{one['peer_version']}: {number(one['ratio'])}" for one in found[1:]
        )
    columns["spread"] = spread
    lines = [f"| {' | '.join(['', *columns])} |", "|---" + "|---:" * len(columns) + "|"]
    for what, entries in grouped.items():
        best_first = sorted(entries, key=lambda entry: entry["ratio"] or 0)
        lines.append(f"| {' | '.join([what, *(cell(best_first) for cell in columns.values())])} |")
    return lines


def cost_of_formats(rows: Sequence[dict[str, Any]]) -> str:
    """What the formats of a race cost in accuracy and in bits, of a trained model (`loss.py`)."""
    losses: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in json.loads((FOLDER / "loss.json").read_text())["rows"]:
        precision, _, what = entry["what"].partition(", ")
        losses[precision, what.partition(" ")[0]] = entry
    plain, found = losses["bfloat16", "loss"], []
    for precision in dict.fromkeys(entry["what"].split(", ")[1] for entry in rows):
        loss, bits = losses[precision, "loss"], losses[precision, "bits"]
        for name, side in (("ours", "ours"), (loss["peer_version"].rpartition(" ")[2], "peer")):
            change = round(100 * (loss[side] / plain[side] - 1), 2) + 0.0  # no -0.00
            found.append(f"{precision} {name} {number(bits[side])} bits, {change:+.2f} %")
    return f"Bits a weight, and change of loss of a trained model (results/loss.json): {'; '.join(found)}."


def share(entry: dict[str, Any]) -> str:
    """Of what the machine would allow."""
    return f"{100 * entry['ours'] / entry['roof']:.0f} %" if entry["roof"] else ""


def of_peer(entry: dict[str, Any], *, named: bool) -> str:
    if entry["peer"] is None:
        return ""
    return (f"{entry['peer_version']}: " if named else "") + number(entry["peer"])


def spread(entries: Sequence[dict[str, Any]]) -> str:
    return f"{100 * max(entry['spread'] for entry in entries):.0f} %" if entries[0]["n"] > 1 else "one run"


def described(rows: Sequence[dict[str, Any]]) -> str:
    """How the numbers of a table came about."""
    most = max(entry["n"] for entry in rows)
    if most == 1:
        return "One run each"
    least = min(entry["n"] for entry in rows if entry["unit"] != PART and entry["n"] > 1)
    runs = f"{most}" if least == most else f"{least} to {most}"
    return f"Medians of {runs} runs" + (" that took turns" if any(entry["peer"] for entry in rows) else "")


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def rendered(text: str) -> str:
    """A page with its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        content = json.loads((FOLDER / f"{match[2]}.json").read_text())
        return match[1] + table(content) + match[4]

    return BLOCK.sub(fill, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def each_page(change: Callable[[str], str]) -> None:
    for path in pages():
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    each_page(rendered)
