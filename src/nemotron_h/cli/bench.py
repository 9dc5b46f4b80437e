"""`nemotron-h bench`: how fast a model reads and writes on this machine, in each precision, beside its peers."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_h.errors import RequestError

if TYPE_CHECKING:
    from nemotron_h.evaluate.rows import Row
    from nemotron_h.evaluate.speed import Question, Race
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
    """Measure a model's speed here, beside what else is installed. Each figure is told once it is measured.

    Peers are llama-cpp-python (given the same weights as GGUF, of as many bits), vLLM and transformers: those in this
    environment, or in the one whose Python is named. All take turns in one run.
    """
    prompts, contexts = prompt or [SHORT], context or [SHORT]
    check_counts(prompts, contexts, runs, at_once)
    # after the checks: they import torch
    from rich.console import Console
    from rich.text import Text

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
        questions = asked_for(chosen(race.folder, precision), prompts, contexts, at_once)
        title = f"{path}, tokens/s on {machine.cpu_name()}, {machine.cores()} cores"
        rows: list[Row] = []
        groups: list[Group] = []
        # a terminal that shows the bar has one writer
        console = watch.console if Console().is_terminal and watch.console.is_terminal else Console()
        if not as_json:
            console.print(f"{title}; medians of {runs}", highlight=False, markup=False)
        for done, (question, found) in enumerate(race.run(questions), 1):
            rows += found
            groups.append(group(found))
            if not as_json:  # what was measured is told at once: the rest may take hours
                console.print(Text("\n") + bars(groups[-1:], width=min(console.width, 100)), highlight=False)
            watch.fraction(done / len(questions), question.what)
    if as_json:
        print(json.dumps(as_mapping(path, rows, race)))
    elif not alone:
        for who, reason in race.absent.items():
            print(f"not in it: {who}: {reason}")
    if plot is not None:  # after what was measured has been told
        save_bars(groups, Path(plot), title=title)
        if not as_json:
            print(plot)


def check_counts(prompts: Sequence[int], contexts: Sequence[int], runs: int, at_once: int | None) -> None:
    """Refuse what cannot be asked."""
    asked = {"prompt": prompts, "context": contexts, "runs": [runs], "at_once": [1 if at_once is None else at_once]}
    for name, counts in asked.items():
        if min(counts) < 1:
            raise RequestError(f"{name}: must be 1 or above; got {min(counts)}")
    if at_once is not None and at_once > MOST_AT_ONCE:
        raise RequestError(f"at_once: must be {MOST_AT_ONCE} or below, which all contestants compute; got {at_once}")


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


def asked_for(
    precisions: Sequence[str], prompts: Sequence[int], contexts: Sequence[int], at_once: int | None
) -> "list[Question]":
    """What is measured, precision by precision."""
    from nemotron_h.evaluate.speed import decode, prefill, together

    return [
        question
        for precision in precisions
        for question in (
            *(prefill(precision, length) for length in prompts),
            *(decode(precision, after) for after in contexts),
            *([together(precision, at_once, SHORT, 128)] if at_once is not None else []),
        )
    ]


def group(found: "Sequence[Row]") -> "Group":
    """For drawing: a bar for each contestant, and how much faster ours is than the best of the others."""
    from nemotron_h.report.bars import Group

    peers = {row.peer_version: row.peer for row in found if row.peer is not None and row.peer_version is not None}
    best = min((row.ratio for row in found if row.ratio is not None), default=None)
    beside = f"; {best:.2f} of the best peer" if best is not None else ""
    spread = max(row.spread for row in found)
    title = f"{found[0].what}, {found[0].unit}{beside}; spread {spread:.0%}"
    return Group(title, {HERE: found[0].ours, **peers}, found[0].roof)


def as_mapping(path: str, rows: "Sequence[Row]", race: "Race") -> dict[str, Any]:
    """For JSON."""
    import torch

    from nemotron_h import __version__, machine

    return {
        "model": path,
        "version": __version__,
        "cpu": machine.cpu_name(),
        "cpu_features": list(machine.cpu_features()),
        "cores": machine.cores(),
        "torch": torch.__version__,
        "rows": [asdict(row) | {"of_roof": row.ours / row.roof if row.roof else None} for row in rows],
        "absent": race.absent,
    }
