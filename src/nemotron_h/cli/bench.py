"""`nemotron-h bench`: how fast a model reads and writes on this machine, in each precision, beside its peers."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_h.errors import RequestError

if TYPE_CHECKING:
    from nemotron_h.evaluate.rows import Row
    from nemotron_h.evaluate.speed import Race
    from nemotron_h.report.bars import Group

SHORT = 512
HERE = "nemotron-h"
MOST_AT_ONCE = 16


def bench(
    path: Annotated[
        str, typer.Argument(help="A checkpoint folder, org/name[@revision] on the Hub, or a preset: random weights.")
    ],
    precision: Annotated[
        list[str] | None,
        typer.Option(help="One to measure (may be given several times).", show_default="what is fast here, int8, int4"),
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a prompt to read (may be given several times).", show_default="512"),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Write after so many tokens (may be given several times).", show_default="512"),
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(help="Also so many requests at once, of 512 tokens in, 128 out.")
    ] = None,
    runs: Annotated[int, typer.Option("--runs", help="Of each, in turns with the peers; the median counts.")] = 5,
    llama: Annotated[str | None, typer.Option(metavar="PYTHON", help="The Python that has llama-cpp-python.")] = None,
    vllm: Annotated[str | None, typer.Option(metavar="PYTHON", help="The Python that has vLLM.")] = None,
    transformers: Annotated[
        str | None, typer.Option(metavar="PYTHON", help="The Python that has transformers.")
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Without peers, though they are installed.")] = False,
    cache: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where a preset's weights and GGUF files are kept.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="A picture too: .png, .svg, .pdf.")] = None,
) -> None:
    """Measure a model's speed here, beside what else is installed.

    Peers are llama-cpp-python (given the same weights as GGUF, of as many bits), vLLM and transformers: those in this
    environment, or in the one whose Python is named. All take turns in one run.
    """
    prompts, contexts = prompt or [SHORT], context or [SHORT]
    asked = {"prompt": prompts, "context": contexts, "runs": [runs], "at_once": [1 if at_once is None else at_once]}
    for name, counts in asked.items():
        if min(counts) < 1:
            raise RequestError(f"{name}: must be 1 or above; got {min(counts)}")
    if at_once is not None and at_once > MOST_AT_ONCE:
        raise RequestError(f"at_once: must be {MOST_AT_ONCE} or below, which all contestants compute; got {at_once}")
    # after the checks: they import torch
    from rich.console import Console

    from nemotron_h import machine
    from nemotron_h.cli.process import settle
    from nemotron_h.cli.pull import folder_of
    from nemotron_h.cli.watch import Watch
    from nemotron_h.config.presets import PRESETS
    from nemotron_h.evaluate.speed import Race, installed, untrained
    from nemotron_h.inference.load import check_precision
    from nemotron_h.report.bars import bars, check_picture, save_bars

    for one in precision or []:
        check_precision(one)
    if plot is not None:
        check_picture(Path(plot))
    settle()
    named = {"llama": llama, "vllm": vllm, "transformers": transformers}
    peers = {} if alone else installed() | {name: python for name, python in named.items() if python is not None}
    kept = Path(cache) if cache is not None else machine.cache_folder() / "bench"
    with Watch(Console(stderr=True), "bench") as watch:
        if path in PRESETS:
            watch.say(f"{path}: random weights, in {kept / path}")
            kept.mkdir(parents=True, exist_ok=True)
        race = Race(untrained(path, kept) if path in PRESETS else Path(folder_of(path)), kept, peers, runs)
        precisions = chosen(race.folder, precision)
        found: list[tuple[Row, float | None]] = []
        steps = len(precisions) * (len(prompts) + len(contexts) + (at_once is not None))
        for own, roof in figures(race, precisions, prompts, contexts, at_once):
            found += [(row, roof) for row in own]
            watch.fraction(len({row.what for row, _ in found}) / steps, own[0].what)
    groups, title = grouped(found), f"{path}, tokens/s on {machine.cpu_name()}, {machine.cores()} cores"
    if as_json:
        print(json.dumps(as_mapping(path, found, race)))
    else:
        console = Console()
        console.print(f"{title}; medians of {runs}\n", highlight=False, markup=False)
        console.print(bars(groups, width=min(console.width, 100)), highlight=False)
        missing = [] if alone else [name for name in named if name not in peers]
        if missing:
            hint = f"--{missing[0]} PYTHON names one that is elsewhere"
            console.print(f"\nnot here: {', '.join(missing)}; {hint}", style="dim")
    if plot is not None:  # after what was measured has been told
        save_bars(groups, Path(plot), title=title)
        if not as_json:
            print(plot)


def chosen(folder: Path, asked: list[str] | None) -> list[str]:
    """The precisions to measure: a folder in integers has one, of another what is fast here and the integers."""
    import torch

    from nemotron_h.inference.load import AUTO, check_stored, chosen_precision, stored_precision

    stored = stored_precision(folder)
    possible = [chosen_precision(AUTO, torch.device("cpu")), "int8", "int4"] if stored is None else [stored]
    found = [possible[0] if one == AUTO else one for one in asked or possible]
    for one in found:
        check_stored(folder, stored, one)
    return found


def figures(
    race: "Race", precisions: Iterable[str], prompts: Iterable[int], contexts: Iterable[int], at_once: int | None
) -> "Iterator[tuple[list[Row], float | None]]":
    """What is measured, against each peer, and the roof of it, where it has one."""
    for precision in precisions:
        with race.contestants(precision) as some:
            for length in prompts:
                roof = race.prefill_roof(precision, length) if precision in ("bfloat16", "float32") else None
                yield race.prefill(some, length), roof
            for after in contexts:
                yield race.decode(some, after), race.decode_roof(precision, after)
            if at_once is not None:
                yield race.together(some, at_once, SHORT, 128), None


def grouped(found: "Iterable[tuple[Row, float | None]]") -> "list[Group]":
    """For drawing: what is measured, with a bar for each contestant."""
    from nemotron_h.report.bars import Group

    groups: dict[str, Group] = {}
    for row, roof in found:
        group = groups.setdefault(row.what, Group(f"{row.what}, {row.unit}", {HERE: row.ours}, roof))
        if row.peer is not None:
            assert row.peer_version is not None
            group.values[row.peer_version] = row.peer
    return list(groups.values())


def as_mapping(path: str, found: "Iterable[tuple[Row, float | None]]", race: "Race") -> dict[str, Any]:
    """For JSON."""
    import torch

    from nemotron_h import __version__, machine

    rows = [asdict(row) | {"roof": roof, "of_roof": row.ours / roof if roof else None} for row, roof in found]
    return {
        "model": path,
        "version": __version__,
        "cpu": machine.cpu_name(),
        "cpu_features": list(machine.cpu_features()),
        "cores": machine.cores(),
        "torch": torch.__version__,
        "rows": rows,
        "absent": race.absent,
    }
