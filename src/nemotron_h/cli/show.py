"""`nemotron-h show`: what a model is made of, and what it needs at a context."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nemotron_h.config.model import ModelConfig

CONTEXTS = (1024, 65_536, 131_072, 1_048_576)


def show(
    model: Annotated[str, typer.Argument(metavar="PRESET|PATH", help="A preset's name, or a checkpoint folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a model's layers, its parameters by kind, and its memory by context."""
    from nemotron_h.config.cost import memory, parameters

    config = model_config(model)
    counts = parameters(config)
    contexts = {tokens: memory(config, tokens) for tokens in CONTEXTS}
    if as_json:
        values = {
            "model": model,
            "pattern": config.pattern,
            "parameters": sum(counts.values()),
            "parameters_by_kind": counts,
            "bytes": {str(tokens): {**terms, "total": sum(terms.values())} for tokens, terms in contexts.items()},
        }
        print(json.dumps(values))
        return
    draw(model, config, counts, contexts)


def model_config(model: str) -> "ModelConfig":
    """A preset's config, or that of a checkpoint folder or config.json."""
    from nemotron_h.config.presets import PRESETS, preset
    from nemotron_h.config.published import read_config

    path = Path(model)
    if model not in PRESETS and path.exists():
        return read_config(path / "config.json" if path.is_dir() else path)
    return preset(model)


def draw(model: str, config: "ModelConfig", counts: dict[str, int], contexts: dict[int, dict[str, int]]) -> None:
    """The same on the terminal."""
    from rich.console import Console

    from nemotron_h.config.pattern import NAMES
    from nemotron_h.report.layers import layer_map
    from nemotron_h.report.table import table
    from nemotron_h.report.units import format_bytes, format_count

    console = Console()
    total = sum(counts.values())
    console.print(
        f"{model}: {format_count(total)} parameters ({total:,}), {len(config.layers)} layers, "
        f"hidden {config.hidden_size}, vocabulary {config.vocab_size:,}",
        highlight=False,
    )
    console.print()
    console.print(layer_map(config.pattern, NAMES))
    console.print()
    shares = [(kind, count, f"{100 * count / total:.1f} %") for kind, count in counts.items()]
    console.print(table(shares, ["kind", "parameters", "share"]))
    terms = [
        (f"{tokens:,}", *(format_bytes(size) for size in sizes.values()), format_bytes(sum(sizes.values())))
        for tokens, sizes in contexts.items()
    ]
    names = [*next(iter(contexts.values())), "together"]
    console.print(table(terms, ["context", *names]))
    console.print("one sequence, bfloat16, states float32; buffers of a step not counted", style="dim")
