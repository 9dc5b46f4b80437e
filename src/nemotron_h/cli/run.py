"""`nemotron-h run`: a recipe's stages in order, each done once, resumed where it was left."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from nemotron_h.cli.watch import Watch
    from nemotron_h.config.recipe import Recipe


def run(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe's name (laptop), or a .toml file.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[TABLE.KEY=VALUE]...", help="train.steps=200 ...")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this stage (may be given several times).")] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start a new run beside the old one.")] = False,
    name: Annotated[
        str | None, typer.Option(help="The run's folder under runs/; by default the recipe's name.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="The folder of all runs.")] = Path("runs"),
) -> None:
    """Run a recipe; run again, it resumes what is unfinished and skips what is done."""
    from rich.console import Console

    from nemotron_h.checkpoint.files import claimed
    from nemotron_h.cli.watch import Watch
    from nemotron_h.config.recipe import read_recipe

    # a JSON string is a TOML string
    chosen = read_recipe(recipe, [*(settings or []), *([f"name={json.dumps(name)}"] if name is not None else [])])
    stages = picked(chosen, only or [], until)
    console = Console()
    folder = run_folder(runs / chosen.name, fresh=fresh)
    again = f"--name {shlex.quote(folder.name)} instead of --fresh" if fresh else "the same command"
    whole = Watch(console, "run")
    whole.say(str(folder))
    with claimed(folder):
        remember(chosen, folder)
        for place, stage in enumerate(stages, 1):
            performed = perform(stage, chosen, folder, Watch(console, stage, again=again))
            seconds = {stage: record["seconds"] for stage, record in read_records(chosen, folder).items()}
            later = [stage for stage in stages[place:] if stage not in seconds]
            left = seconds_left(chosen.limit_seconds, seconds, later)
            if performed and left is not None and "train" not in seconds:  # training measures itself
                whole.say(f"about {left:.0f} s to go at this machine's pace")
        summarise(chosen, folder, console)


def run_folder(folder: Path, *, fresh: bool) -> Path:
    """The run's folder; fresh: the first of NAME, NAME-2, NAME-3 ... that does not exist."""
    number = 2
    first = folder
    while fresh and folder.exists():
        folder = first.with_name(f"{first.name}-{number}")
        number += 1
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remember(recipe: "Recipe", folder: Path) -> None:
    """Write the settings; refuse to go on with others."""
    from nemotron_h.checkpoint.files import write_text
    from nemotron_h.config.settings import first_difference, to_mapping
    from nemotron_h.errors import ConfigError

    path, ours = folder / "recipe.json", to_mapping(recipe)
    if not path.exists():
        write_text(path, json.dumps(ours, indent=2) + "\n")
        return
    before = read_object(path)
    free = {"name": "", "limit_seconds": {}}  # what steers no result
    if changed := first_difference({**before, **free}, {**ours, **free}):
        key, old, new = changed
        raise ConfigError(
            f"{key}: must stay {old!r}, with which {folder} was begun; got {new!r}; "
            "use --fresh, or --name for another run"
        )


def picked(recipe: "Recipe", only: list[str], until: str | None) -> list[str]:
    """The stages to walk, in the recipe's order."""
    from nemotron_h.config.settings import nearest
    from nemotron_h.errors import ConfigError

    for stage in (*only, *([until] if until else [])):
        if stage not in recipe.stages:
            raise ConfigError(
                f"stage: must be one of the recipe's; got {stage!r}; {nearest(stage, list(recipe.stages))}"
            )
    stages = list(recipe.stages)
    if until:
        stages = stages[: stages.index(until) + 1]
    return [stage for stage in stages if not only or stage in only]


def perform(stage: str, recipe: "Recipe", folder: Path, watch: "Watch") -> bool:
    """One stage, unless its record says it is done. Returns: whether it was performed now."""
    from nemotron_h.checkpoint.files import write_text
    from nemotron_h.cli.stages import STAGES

    record = folder / "stages" / f"{stage}.json"
    unfinished = record.with_suffix(".unfinished.json")  # the seconds of goes that were interrupted
    with watch:
        if record.exists():
            watch.say("done before")
            return False
        before = read_object(unfinished, "seconds")["seconds"] if unfinished.exists() else 0.0
        record.parent.mkdir(exist_ok=True)
        try:
            result = STAGES[stage](recipe, folder, watch)
        finally:
            seconds = before + watch.seconds
            write_text(unfinished, json.dumps({"seconds": seconds}) + "\n")
        limit = recipe.limit_seconds.get(stage)
        late = f", over its limit of {limit} s" if limit is not None and seconds > limit else ""
        watch.say(f"{seconds:.1f} s{late}")
    write_text(record, json.dumps({"seconds": round(seconds, 2), **result}, indent=2, ensure_ascii=False) + "\n")
    unfinished.unlink()
    return True


def seconds_left(limits: Mapping[str, int], seconds: Mapping[str, float], later: Sequence[str]) -> float | None:
    """What later stages take, their limits being what is usual, at the pace of the finished ones.

    seconds: of the finished stages. None: no stage is left, or one has no limit, or no finished one tells the pace.
    """
    usual = sum(limits.get(stage, 0) for stage in seconds)
    if not usual or not later or not limits.keys() >= set(later):
        return None
    return sum(limits[stage] for stage in later) * sum(seconds[stage] for stage in seconds if stage in limits) / usual


def read_records(recipe: "Recipe", folder: Path) -> dict[str, dict[str, Any]]:
    """What each finished stage returned, and its seconds."""
    paths = {stage: folder / "stages" / f"{stage}.json" for stage in recipe.stages}
    return {stage: read_object(path, "seconds") for stage, path in paths.items() if path.exists()}


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object of the run that holds those keys. Raises: CheckpointError."""
    from nemotron_h.errors import CheckpointError

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        got = "another value"
    except ValueError as error:  # no JSON, or no UTF-8
        found, got = None, str(error)
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        rule = " with ".join(["a JSON object", *keys])
        raise CheckpointError(f"{path}: must be {rule}; got {got}; remove it to do again what wrote it")
    return found


def summarise(recipe: "Recipe", folder: Path, console: "Console") -> None:
    """result.json, and the run's end as its reader sees it."""
    from nemotron_h.checkpoint.files import write_text
    from nemotron_h.cli.summary import show_summary

    records = read_records(recipe, folder)
    result = {
        "bits_per_byte": records.get("train", {}).get("bits_per_byte"),
        "baselines": records.get("baselines", {}).get("bits_per_byte"),
        "seconds": {stage: record["seconds"] for stage, record in records.items()},
        "checkpoint": records.get("train", {}).get("checkpoint"),
    }
    write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
    show_summary(records, folder, console)
