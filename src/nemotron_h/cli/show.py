"""`nemotron-h show`: what a model is made of, and what it needs at a context."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from nemotron_h.config.model import ModelConfig

CONTEXTS = (1024, 65_536, 131_072, 1_048_576)


def show(
    model: Annotated[
        str | None,
        typer.Argument(metavar="PRESET|PATH", help="A preset's name, a checkpoint folder, or org/name on the Hub."),
    ] = None,
    this_machine: Annotated[
        bool, typer.Option("--machine", help="Show what this machine has, and measure it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a model's layers, its parameters by kind, and what memory and work it needs by context; or the machine."""
    from nemotron_h.errors import RequestError

    if model is None and not this_machine:
        raise RequestError("PRESET|PATH: must be given, or --machine; got neither; --help shows the usage")
    config, stored = (None, None) if model is None else (model_config(model), weights_format(model))
    if as_json:
        named = {} if config is None else {"model": model, "format": stored, **facts(config)}
        print(json.dumps(named | ({"machine": machine_facts()} if this_machine else {})))
        return
    from rich.console import Console

    console = Console()
    parts = [] if model is None or config is None else [*made_of(model, config, stored), *needs(config)]
    for part in (*parts, *(drawn_machine(machine_facts()) if this_machine else ())):
        console.print(part, highlight=False)


def model_config(model: str) -> "ModelConfig":
    """A preset's config, or that of a config.json, a checkpoint folder, or a name on the Hub."""
    from nemotron_h.config.presets import preset
    from nemotron_h.config.published import read_config

    path = config_path(model)
    return preset(model) if path is None else read_config(path)


def weights_format(model: str) -> str | None:
    """What the weights are stored in; None: a preset has none."""
    from nemotron_h.cli.ls import stored_format
    from nemotron_h.config.keys import CONFIG_FILE, read_object

    path = config_path(model)
    return None if path is None or path.name != CONFIG_FILE else stored_format(path.parent, read_object(path))


def config_path(model: str) -> Path | None:
    """The config.json that is meant; None: a preset is."""
    from nemotron_h.cli.pull import folder_of
    from nemotron_h.config.keys import CONFIG_FILE
    from nemotron_h.config.presets import PRESETS

    if model in PRESETS or ("/" not in model and not Path(model).exists()):
        return None
    path = folder_of(model, weights=False)
    return path / CONFIG_FILE if path.is_dir() else path


def machine_facts() -> dict[str, Any]:
    """What this machine has and, measured now, can do; in bytes, and in operations and bytes per second."""
    import torch

    from nemotron_h import machine
    from nemotron_h.cli.process import settle
    from nemotron_h.inference.load import AUTO, chosen_precision
    from nemotron_h.ops.jit import compiler, linear, quads

    settle()  # as the verbs that compute do
    rates, memory = machine.matmul_rates(), machine.memory()
    return {
        "cpu": machine.cpu_name(),
        "features": list(machine.cpu_features()),
        "cores": machine.cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory.total_bytes,
        "limit_bytes": memory.limit_bytes,
        "available_bytes": memory.available_bytes,
        "bandwidth": machine.bandwidth(),
        "matmul": rates,
        "precision": chosen_precision(AUTO, torch.device("cpu")),
        "kernels": compiler.MISSING or "compiled by numba",
        "bfloat16": bfloat16(linear, kernels=not compiler.MISSING),
        "integers": integers(quads, compiler.FEATURES),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch": torch.__version__,
    }


def bfloat16(linear: Any, *, kernels: bool) -> str:
    """Who multiplies by a matrix in it that is laid out for reading (`ops/linear.py`)."""
    if linear.PRODUCTS or not kernels:
        return "oneDNN, few rows a kernel of ours" if linear.RUNS else "oneDNN"
    return "a kernel of ours, widened to float32"


def integers(quads: Any, features: Mapping[str, bool]) -> str:
    """What the products of integers are made of (`ops/jit/quads.py`)."""
    if not features:
        return "torch, in float64"
    if quads.ADDS_QUADS:
        return f"VNNI, {quads.LANES} sums at a time"
    return "AVX2, pairs at a time" if features.get("avx2", False) else "one by one"


def drawn_machine(facts: dict[str, Any]) -> list["RenderableType"]:
    """The same as a table."""
    from nemotron_h.report.table import table
    from nemotron_h.report.units import format_bytes

    limited = facts["limit_bytes"] < facts["memory_bytes"]
    rows = [
        ("processor", facts["cpu"]),
        ("vector instructions", ", ".join(facts["features"]) or "unknown"),
        ("cores that may be used", f"{facts['cores']}; torch takes {facts['threads']} threads"),
        ("memory", format_bytes(facts["memory_bytes"])),
        *([("of it the container may have", format_bytes(facts["limit_bytes"]))] if limited else []),
        ("free now", format_bytes(facts["available_bytes"])),
        ("reads memory at", f"{facts['bandwidth'] / 1e9:.0f} GB/s"),
        *((f"multiplies {name} at", f"{rate / 1e9:,.0f} GFLOP/s") for name, rate in facts["matmul"].items()),
        ("precision=auto takes", facts["precision"]),
        ("CPU kernels", facts["kernels"]),
        ("products in bfloat16", facts["bfloat16"]),
        ("products in int8 and int4", facts["integers"]),
        ("GPUs that torch sees", ", ".join(facts["gpus"]) or "none"),
        ("torch", facts["torch"]),
    ]
    return [table(rows, ["this machine", ""])]


def facts(config: "ModelConfig") -> dict[str, Any]:
    """All that is shown and its parts, as JSON has it; contexts are strings, as its keys must be."""
    from nemotron_h.config import cost

    counts = cost.parameters(config)
    return {
        "pattern": config.pattern,
        "parameters": sum(counts.values()),
        "parameters_by_kind": counts,
        "weight_bytes": {name: with_total(cost.weight_bytes(config, name)) for name in cost.WEIGHT_FORMATS},
        "bytes": {
            name: {str(tokens): with_total(cost.peak_bytes(config, tokens, weights=name)) for tokens in CONTEXTS}
            for name in cost.WEIGHT_FORMATS
        },
        "token_flops": {
            str(tokens): {
                "prefill": with_total(cost.prefill_flops(config, tokens)),
                "decode": with_total(cost.decode_flops(config, tokens)),
                "training": with_total(cost.training_flops(config, tokens)),
            }
            for tokens in CONTEXTS
        },
    }


def with_total(terms: dict[str, Any]) -> dict[str, Any]:
    return {**terms, "total": sum(terms.values())}


def made_of(model: str, config: "ModelConfig", stored: str | None) -> list["RenderableType"]:
    """A headline, the layers in order, and the parameters by kind. stored: what the weights are in, where known."""
    from nemotron_h.config.cost import parameters
    from nemotron_h.config.pattern import NAMES
    from nemotron_h.report.layers import layer_map
    from nemotron_h.report.table import table
    from nemotron_h.report.units import format_count

    counts = parameters(config)
    total = sum(counts.values())
    shares = [(kind, count, f"{100 * count / total:.1f} %") for kind, count in counts.items()]
    return [
        f"{model}: {format_count(total)} parameters ({total:,})" + (f" in {stored}" if stored is not None else ""),
        f"{len(config.layers)} layers, hidden {config.hidden_size}, vocabulary {config.vocab_size:,}",
        "",
        layer_map(config.pattern, NAMES),
        "",
        table(shares, ["kind", "parameters", "share"]),
    ]


def needs(config: "ModelConfig") -> list["RenderableType"]:
    """Memory by format of the weights and context, then what one sequence and one token are of it."""
    from rich.text import Text

    from nemotron_h.config import cost
    from nemotron_h.report.table import table
    from nemotron_h.report.units import format_bytes, format_count

    names = [f"{tokens:,}" for tokens in CONTEXTS]
    memory = []
    for weights in cost.WEIGHT_FORMATS:
        alone = sum(cost.weight_bytes(config, weights).values())
        totals = [sum(cost.peak_bytes(config, tokens, weights=weights).values()) for tokens in CONTEXTS]
        memory.append((weights, *map(format_bytes, (alone, *totals))))
    sequence = []
    for tokens, name in zip(CONTEXTS, names, strict=True):
        keys_values = cost.peak_bytes(config, tokens)["keys and values"]
        work = [flops(config, tokens) for flops in (cost.prefill_flops, cost.decode_flops, cost.training_flops)]
        sequence.append((name, format_bytes(keys_values), *(format_count(sum(kinds.values())) for kinds in work)))
    state = {term: format_bytes(size) for term, size in cost.state_bytes(config).items() if size}
    return [
        "Memory of the weights alone, and with one sequence of so many tokens:",
        table(memory, ["weights", "alone", *names]),
        Text(
            "fp8, int8 and int4 are of the layers' matrices (head: int8 in the last two),\n"
            "the rest is bfloat16. nvfp4: 4.5 bits on everything. Step buffers: not counted.\n",
            style="dim",
        ),
        "One sequence in bfloat16, and the FLOPs of one of its tokens:",
        table(sequence, ["tokens", "keys and values", "read", "generate", "train"]),
        Text(
            "read: a token of a prompt, on average. generate: the next token.\n"
            "train: forward and backward. B: a thousand million."
            + ("\nState, however long the sequence:" if state else "")
            + "".join(f"\n  {size} {term}" for term, size in state.items()),
            style="dim",
        ),
    ]
