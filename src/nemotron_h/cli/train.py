"""`nemotron-h train`: one training run on token shards."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nemotron_h.cli.watch import Watch
    from nemotron_h.config.model import ModelConfig
    from nemotron_h.config.train import TrainConfig
    from nemotron_h.training.loop import Trained

INTERRUPTED = 130


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
    """Train and show it. Leaves with 130 where it was asked to stop: all is saved."""
    from nemotron_h.data.batches import Batches, windows
    from nemotron_h.data.shards import Shard
    from nemotron_h.text.tokenizer import Tokenizer
    from nemotron_h.training.loop import Progress
    from nemotron_h.training.loop import train as run

    shard = Shard(data)
    held_out = Shard(validation) if validation is not None else None
    learned = Tokenizer.load(tokenizer) if tokenizer is not None else None

    def show(progress: Progress) -> None:
        rate = f"{progress.tokens_per_second:,.0f} tokens/s"
        note = f"step {progress.step}/{progress.steps}  loss {progress.loss:.3f}  {rate}"
        watch.fraction(progress.step / progress.steps, note)
        if progress.validation_loss is not None:
            watch.say(f"{note}  held-out loss {progress.validation_loss:.4f}")

    trained = run(
        model,
        config,
        Batches(shard, config.sequence_length, config.batch_size, config.seed),
        lambda limit: windows(held_out, config.sequence_length, config.batch_size, limit=limit) if held_out else [],
        out,
        tokenizer=learned,
        watch=show,
    )
    if not trained.finished:
        watch.say(f"stopped at step {trained.step} of {config.steps}; saved; the same command goes on from there")
        raise typer.Exit(INTERRUPTED)
    return trained
