"""Measurements as files, and the documentation's numbers out of them.

    results/NAME.json     the rows of one benchmark, with the command, the commit and the machine that gave them
    <!-- results NAME --> ... <!-- end -->     in a page: a table made from it

`python benchmarks/results.py` makes every table anew. A row is {what, unit, ours, peer, peer_version, ratio, n,
spread}: medians of n runs that took turns with the peer's, ratio above 1 where ours is better, spread the widest
(largest - smallest) / median of the two. A row without a peer has none of its fields.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemotron_h.evaluate.rows import Row

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "results"
VARIABLES = ("OMP_", "ATEN_", "ONEDNN_")  # of the environment, that change how fast or in which order torch computes
BLOCK = re.compile(r"(<!-- results (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def commit() -> str:
    """What is about to be measured; to be asked before it is, for files may change meanwhile. Pages and earlier results
    may differ from what is checked in."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def write(name: str, rows: Sequence[Row], commit: str) -> Path:
    """Write results/NAME.json, and show it. commit: of what was measured."""
    import torch  # noqa: PLC0415 - making tables needs none

    from nemotron_h import machine  # noqa: PLC0415

    content = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(portable, sys.argv[1:])]),
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
        "rows": [asdict(entry) for entry in rows],
    }
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(table(content))
    return path


def portable(argument: str) -> str:
    """A path of this machine by its last parts: an environment's Python, say."""
    return "/".join(Path(argument).parts[-3:]) if argument.startswith("/") else argument


def table(content: dict[str, Any]) -> str:
    """A results file as Markdown."""
    rows = content["rows"]
    peers = sorted({entry["peer_version"] for entry in rows if entry["peer_version"]})
    lines = ["| | ours |" + "".join(f" {peer} | ratio |" for peer in peers) + " spread |"]
    lines.append("|---|---:|" + "---:|---:|" * len(peers) + "---:|")
    for entry in rows:
        cells = [f"{entry['what']}, {entry['unit']}", number(entry["ours"])]
        for peer in peers:
            cells += [number(entry["peer"]), number(entry["ratio"])] if entry["peer_version"] == peer else ["", ""]
        spread = f"{100 * entry['spread']:.0f} %" if entry["n"] > 1 else "one run"
        lines.append("| " + " | ".join([*cells, spread]) + " |")
    features = ", ".join(content["cpu_features"])
    lines += [
        "",
        f"{described(rows)}; `{content['command']}`, "
        f"{content['date']}, commit {content['commit']}, {content['cpu']} ({features}), {content['threads']} threads, "
        f"torch {content['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def described(rows: Sequence[dict[str, Any]]) -> str:
    """How the numbers of a table came about."""
    most = max(entry["n"] for entry in rows)
    if most == 1:
        return "One run each"
    return f"Medians of {most} runs" + (" that took turns" if any(entry["peer"] for entry in rows) else "")


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
