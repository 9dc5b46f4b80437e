"""`nemotron-h train`: one training run on token shards."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron_h.signals import SIGNALLED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nemotron_h.cli.watch import Watch
    from nemotron_h.config.model import ModelConfig
    from nemotron_h.config.train import TrainConfig
    from nemotron_h.data.batches import Batch
    from nemotron_h.training.loop import Trained


def train(
    model: Annotated[str, typer.Argument(metavar="PRESET|PATH", help="A preset's name, or a config.json.")],
    data: Annotated[Path, typer.Argument(help="The shard to train on: NAME of NAME.bin and NAME.idx.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="steps=1000 ...")] = None,
    validation: Annotated[Path | None, typer.Option(help="The held-out shard.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json to save with each checkpoint.")] = None,
    out: Annotated[Path, typer.Option(help="The run's folder: metrics and checkpoints.")] = Path("runs/train"),
) -> None:
    """Train a model on token shards; run again, it goes on from the newest checkpoint."""
    from rich.console import Console

    from nemotron_h.cli.show import model_config
    from nemotron_h.cli.watch import Watch
    from nemotron_h.config.recipe import overridden
    from nemotron_h.config.settings import from_mapping
    from nemotron_h.config.train import TrainConfig

    config = from_mapping(TrainConfig, overridden({}, settings or []))
    with Watch(Console(), "train") as watch:
        trained = run_training(model_config(model), config, data, validation, tokenizer, out, watch)
        if trained.validation_targets:
            watch.say(f"held-out loss {trained.validation_nats / trained.validation_targets:.4f}, of all windows")
        watch.say(f"checkpoint {trained.checkpoint}")


def run_training(
    model: "ModelConfig",
    config: "TrainConfig",
    data: Path,
    validation: Path | None,
    tokenizer: Path | None,
    out: Path,
    watch: "Watch",
) -> "Trained":
    """Train and show it. Leaves with 130 or 143 where a signal asked it to stop: all is saved."""
    from nemotron_h.cli.process import settle
    from nemotron_h.data.batches import Batches, count_windows, windows
    from nemotron_h.data.shards import Shard
    from nemotron_h.text.tokenizer import Tokenizer
    from nemotron_h.training.loop import Progress
    from nemotron_h.training.loop import train as run
    from nemotron_h.training.pace import Pace

    settle()
    shard = Shard(data)
    held_out = Shard(validation) if validation is not None else None
    learned = Tokenizer.load(tokenizer) if tokenizer is not None else None
    pace = Pace(config, 0 if held_out is None else count_windows(held_out, config.held_out_length))

    def show(progress: Progress) -> None:
        rate = f"{progress.tokens_per_second:,.0f} tokens/s"
        note = f"step {progress.step}/{progress.steps}  loss {progress.loss:.3f}  {rate}"
        watch.fraction(progress.step / progress.steps, note)
        if progress.validation_loss is not None:
            watch.say(f"{note}  held-out loss {progress.validation_loss:.4f}")
        left = pace.add(progress.step, progress.seconds)
        if left is not None:
            watch.say(f"about {left:.0f} s to go")

    def validation_batches(limit: int | None) -> "Iterable[Batch]":
        if held_out is None:
            return []
        return windows(held_out, config.held_out_length, config.held_out_batch, limit=limit)

    trained = run(
        model,
        config,
        Batches(shard, config.sequence_length, config.batch_size, config.seed),
        validation_batches,
        out,
        tokenizer=learned,
        watch=show,
    )
    if trained.stopped_by is not None:
        watch.say(f"stopped at step {trained.step} of {config.steps}; saved; {watch.again} goes on from there")
        raise typer.Exit(SIGNALLED + trained.stopped_by)
    return trained
