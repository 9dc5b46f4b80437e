"""`nemotron-h ls`: the checkpoints in the cache that all programs share, and the runs here, with their sizes."""

import json
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nemotron_h.checkpoint.hub import Held

SHORT = 12  # digits of a commit that tell it from others
STEP = "step-"


def ls(
    runs: Annotated[Path, typer.Option(help="The folder of all runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the checkpoints in the cache and the runs here, with their sizes."""
    from nemotron_h.checkpoint.hub import cache_folder, read_cache

    cache = read_cache()
    rows = {each: checkpoint_row(each) for each in cache.held}
    others = [each.size_bytes for each, row in rows.items() if row is None]
    listed = {
        "cache": str(cache_folder()),
        "checkpoints": [row for row in rows.values() if row is not None],
        "others": {"count": len(others), "bytes": sum(others)},
        "unreadable": cache.unreadable,
        "runs": run_rows(runs),
    }
    if as_json:
        print(json.dumps(listed))
    else:
        draw(listed, runs)


def checkpoint_row(each: "Held") -> dict[str, Any] | None:
    """A checkpoint of this family as plain values; None: of another."""
    from nemotron_h.config.keys import CONFIG_FILE, read_object
    from nemotron_h.config.published import MODEL_TYPE, ROPE_MODEL_TYPE
    from nemotron_h.errors import CheckpointError

    try:
        config = read_object(each.folder / CONFIG_FILE)
    except CheckpointError:
        return None
    if config.get("model_type") not in (MODEL_TYPE, ROPE_MODEL_TYPE):
        return None
    return {
        "name": each.name.repository,
        "revision": each.name.revision,
        "commit": each.commit,
        "format": stored_format(each.folder, config),
        "bytes": each.size_bytes,
        "missing": list(each.missing),
        "path": str(each.folder),
    }


def stored_format(folder: Path, config: dict[str, Any]) -> str | None:
    """What the weights are stored in: a quantised format, or the dtype that config.json states."""
    from nemotron_h.config.quantization import read_quantization
    from nemotron_h.errors import NemotronError

    try:
        quantised = read_quantization(folder)
    except NemotronError:  # one we do not read, which is worth listing all the same
        return "other"
    stated = config.get("dtype", config.get("torch_dtype"))
    return " and ".join(sorted(quantised)) or (stated if isinstance(stated, str) and stated.isidentifier() else None)


def run_rows(runs: Path) -> list[dict[str, Any]]:
    """Each run with the step of its newest checkpoint."""
    folders = sorted(path for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
    rows = []
    for folder in folders:
        steps = {int(path.name.removeprefix(STEP)): path for path in checkpoints(folder)}
        newest = max(steps, default=None)
        rows.append(
            {
                "name": folder.name,
                "steps": newest,
                "bytes": size_bytes(folder),
                "checkpoint": None if newest is None else str(steps[newest]),
            }
        )
    return rows


def size_bytes(folder: Path) -> int:
    """Of its files. What a run removes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(parent, name).lstat().st_size
    return total


def checkpoints(run: Path) -> list[Path]:
    """Of `nemotron-h run`, and of `nemotron-h train`, which has no stages."""
    found = [path for part in ("training", "") for path in (run / part / "checkpoints").glob(f"{STEP}*")]
    return [path for path in found if path.name.removeprefix(STEP).isdecimal()]


def draw(listed: dict[str, Any], runs: Path) -> None:
    """The same on the terminal."""
    from rich.console import Console

    from nemotron_h.report.table import table
    from nemotron_h.report.units import format_bytes

    console = Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    held = [
        (
            row["name"],
            row["commit"][:SHORT] if row["revision"] == row["commit"] else f"{row['revision']} {row['commit'][:SHORT]}",
            format_bytes(row["bytes"]),
            row["format"],
            "incomplete" if row["missing"] else "whole",
        )
        for row in listed["checkpoints"]
    ]
    if held:
        console.print(table(held, ["checkpoint", "revision", "size", "format", "state"]))
    else:
        say("no checkpoint of this family")
    count, size = listed["others"]["count"], format_bytes(listed["others"]["bytes"])
    say(f"in {listed['cache']}; models of other families there: {count}, {size}")
    if listed["unreadable"]:
        say(f"damaged folders there, not listed: {listed['unreadable']}")
    console.print()
    if listed["runs"]:
        rows = [(row["name"], row["steps"], format_bytes(row["bytes"])) for row in listed["runs"]]
        console.print(table(rows, ["run", "steps", "size"]))
    say(f"in {runs}" if listed["runs"] else f"no runs in {runs}")
