"""`nemotron-h plan`: what of a model fits on a device, and how fast it could be there, from its config alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from nemotron_h.config.devices import Device
    from nemotron_h.config.model import ModelConfig
    from nemotron_h.config.plan import Plan, Work

HERE = "cpu"


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="PRESET|PATH", help="A preset, a peer (llama-3.1-8b, ...), a checkpoint folder, or org/name."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="h100, h200, a10g, rtx5090, cpu (this machine, measured), or a .toml or .json file.")
    ] = "h100",
    devices: Annotated[
        int | None, typer.Option(help="How many.", show_default="one, or the whole nodes of 8 that its weights ask for")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 65_536,
    output: Annotated[int, typer.Option(help="Tokens that come out.")] = 1024,
    batch: Annotated[int | None, typer.Option(help="Sequences at once.", show_default="as many as fit")] = None,
    precision: Annotated[
        str, typer.Option(help="Of the weights: float32, bfloat16, fp8, int8, int4, nvfp4.")
    ] = "bfloat16",
    keys_values_bits: Annotated[
        int | None, typer.Option(help="32, 16, 8 or 4.", show_default="as the model computes")
    ] = None,
    program: Annotated[
        str, typer.Option(help="Whose share of the roofline to reckon with: nemotron-h (all of it), megatron-lm, vllm.")
    ] = "nemotron-h",
    against: Annotated[str | None, typer.Option(help="Another model to put beside it.")] = None,
    train_tokens: Annotated[float | None, typer.Option(help="Also the days to train on so many tokens.")] = None,
    train_devices: Annotated[int, typer.Option(help="On so many devices.")] = 1,
    utilisation: Annotated[
        float, typer.Option(help="The share of the peak that training reaches: an assumption.")
    ] = 0.4,
    published: Annotated[
        bool, typer.Option("--published", help="What was published of the family and its peers, beside the prediction.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the bytes, the largest batch, the longest context and the time of a model on a device, by a roofline."""
    from rich.console import Console

    from nemotron_h.config.plan import Work, training_days
    from nemotron_h.errors import RequestError
    from nemotron_h.report.units import format_count

    if model is None and not published:
        raise RequestError("PRESET|PATH: must be given, or --published; got neither; --help shows the usage")
    work = Work(
        input_tokens=context,
        output_tokens=output,
        batch=batch,
        weights=precision,
        keys_values_bits=keys_values_bits,
        program=program,
    )
    told: dict[str, Any] = {}
    parts: list[RenderableType] = []
    if model is not None:
        named = {name: shape_of(name) for name in (model, against) if name is not None}
        chosen = device_of(device)
        plans = {name: planned(config, chosen, work, devices) for name, config in named.items()}
        told = as_mapping(chosen, work, plans)
        parts += drawn(chosen, work, plans)
        if train_tokens is not None:
            days = {
                name: training_days(
                    config, train_tokens, chosen, devices=train_devices, precision=precision, utilisation=utilisation
                )
                for name, config in named.items()
            }
            told |= {"train_tokens": train_tokens, "train_devices": train_devices, "training_days": days}
            took = "; ".join(f"{name} {count:,.1f} days" for name, count in days.items())
            on = f"{train_devices:,} devices at {utilisation:.0%} of the peak"
            parts.append(f"To train on {format_count(train_tokens)} tokens with {on}: {took}")
    if published:
        told |= as_published()
        parts += drawn_published(**as_published())
    if as_json:
        print(json.dumps(told))
        return
    console = Console()
    for part in parts:
        console.print(part, highlight=False)


def shape_of(name: str) -> "ModelConfig":
    """Of a preset, a peer, a checkpoint folder or a name on the Hub."""
    from nemotron_h.cli.show import model_config
    from nemotron_h.config.peers import PEERS, shape

    return shape(name) if name in PEERS or not ("/" in name or Path(name).exists()) else model_config(name)


def device_of(name: str) -> "Device":
    """One that is listed, this machine as it is measured now, or what a file says."""
    from nemotron_h.config.devices import device, read_device

    if name == HERE:
        from nemotron_h.cli.process import settle
        from nemotron_h.evaluate.here import this_machine

        settle()  # as the verbs that compute do
        return this_machine()
    return read_device(Path(name)) if name.endswith((".toml", ".json")) else device(name)


def planned(config: "ModelConfig", device: "Device", work: "Work", devices: int | None) -> "Plan":
    from nemotron_h.config.plan import efficiency, fewest, plan

    count = devices or (1 if device.name == HERE else fewest(config, device, work))
    return plan(config, device, work, devices=count, efficiency=efficiency(work.program))


def as_mapping(device: "Device", work: "Work", plans: "dict[str, Plan]") -> dict[str, Any]:
    """For JSON."""
    from dataclasses import asdict

    from nemotron_h.config.settings import to_mapping

    told = {
        "device": to_mapping(device),
        "work": to_mapping(work),
        "plans": {n: asdict(one) for n, one in plans.items()},
    }
    return told | ({"ratio": ratio_of(list(plans.values()))} if len(plans) == 2 else {})


def ratio_of(plans: "Sequence[Plan]") -> float:
    """Output tokens of a device, the first's over the second's."""
    first, second = plans
    return first.output_tokens_per_device_second / second.output_tokens_per_device_second


def drawn(device: "Device", work: "Work", plans: "dict[str, Plan]") -> list["RenderableType"]:
    """A column for each model."""
    from rich.text import Text

    from nemotron_h.report.table import table
    from nemotron_h.report.units import format_bytes

    def row(what: str, told: Any) -> list[str]:
        return [what, *(told(one) for one in plans.values())]

    terms = list(next(iter(plans.values())).bytes)
    rows = [
        row("devices", lambda one: str(one.devices)),
        row("sequences at once", lambda one: f"{one.batch} of {one.largest_batch} that fit"),
        *(row(term, lambda one, term=term: format_bytes(one.bytes[term])) for term in terms),
        row(
            "of memory",
            lambda one: f"{sum(one.bytes.values()) / one.limit_bytes:.0%} of {format_bytes(one.limit_bytes)}",
        ),
        row(
            "longest context of so many", lambda one: f"{one.longest_context:,}" if one.longest_context else "no limit"
        ),
        row("their prompts", lambda one: f"{seconds(one.prompt_seconds)} ({one.prompt_bound})"),
        row("a step", lambda one: f"{seconds(one.step_seconds)} ({one.step_bound})"),
        row("output tokens/s", lambda one: f"{one.output_tokens_per_second:,.4g}"),
        row("of a device", lambda one: f"{one.output_tokens_per_device_second:,.4g}"),
        row("output tokens of a device-hour", lambda one: f"{one.output_tokens_per_device_hour:,.0f}"),
    ]
    asked = f"{work.input_tokens:,} tokens in, {work.output_tokens:,} out, weights in {work.weights}"
    first = next(iter(plans.values()))
    share = "all of the roofline" if first.efficiency == 1 else f"{first.efficiency:.0%} of the roofline, fitted"
    parts: list[RenderableType] = [
        table(rows, ["", *plans], title=f"{device.name}: {asked}"),
        Text(
            f"{work.program}: {share}. What bounds a time stands behind it. Output tokens: over the time of prompts\n"
            "and steps. What devices tell each other is not counted.",
            style="dim",
        ),
    ]
    if len(plans) == 2:
        one, other = plans
        parts.append(f"{one} gives {ratio_of(list(plans.values())):.2f} times the output tokens of {other} on a device")
    return parts


def seconds(value: float) -> str:
    return f"{value * 1e3:,.3g} ms" if value < 1 else f"{value:,.4g} s"


def as_published() -> dict[str, Any]:
    """What was published beside what the roofline predicts, with one constant for each program."""
    from nemotron_h.config.peers import PUBLISHED, PUBLISHED_RATIOS
    from nemotron_h.config.plan import efficiency, predicted

    rates = {name: efficiency(one.program) * predicted(name) for name, one in PUBLISHED.items()}
    return {
        "efficiency": {program: efficiency(program) for program in sorted({one.program for one in PUBLISHED.values()})},
        "rates": [
            {"model": name, "program": one.program, "published": one.tokens_per_second, "predicted": rates[name]}
            for name, one in PUBLISHED.items()
        ],
        "ratios": [
            {
                "models": [first, second],
                "published": PUBLISHED[first].tokens_per_second / PUBLISHED[second].tokens_per_second,
                "predicted": rates[first] / rates[second],
                "held": PUBLISHED[first].held and PUBLISHED[second].held,
            }
            for first, second in PUBLISHED_RATIOS
        ],
    }


def drawn_published(
    efficiency: dict[str, float], rates: list[dict[str, Any]], ratios: list[dict[str, Any]]
) -> list["RenderableType"]:
    from rich.text import Text

    from nemotron_h.report.table import table

    def off(row: dict[str, Any]) -> str:
        return f"{row['predicted'] / row['published'] - 1:+.0%}"

    of_rates = [(row["model"], row["program"], row["published"], row["predicted"], off(row)) for row in rates]
    of_ratios = [
        (" / ".join(row["models"]), row["published"], row["predicted"], off(row), "" if row["held"] else "software")
        for row in ratios
    ]
    fitted = ", ".join(f"{program} {share:.3f}" for program, share in efficiency.items())
    return [
        table(of_rates, ["model", "program", "published", "predicted", "off"], title="Output tokens/s of an H100"),
        table(of_ratios, ["ratio", "published", "predicted", "off", ""]),
        Text(
            f"65,536 tokens in, 1,024 out. One constant a program, fitted: {fitted}.\n"
            "software: the T-8B and Llama-3.1-8B cost the same and were published apart; the 405B is far slower\n"
            "than its bytes and FLOPs say. No roofline has that.",
            style="dim",
        ),
    ]
