"""The training loop: steps, validation, checkpoints, and an end at any moment from which it goes on to the same bits.

A run's folder holds `metrics.jsonl` and `checkpoints/step-N`. What a checkpoint remembers besides weights and moments
is two integers: the step, and the place in the data (windows read so far). Everything random follows from the seed and
those, so a run that was killed and one that was not end in the same bits (same machine, threads and torch).
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nemotron_h.checkpoint.files import claimed
from nemotron_h.checkpoint.load import put
from nemotron_h.checkpoint.resume import newest_step, read_step, save_step, step_folder
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.settings import first_difference, to_mapping
from nemotron_h.config.train import Precision, TrainConfig
from nemotron_h.data.batches import Batch, Batches
from nemotron_h.errors import CheckpointError
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.signals import stop_signals
from nemotron_h.text.tokenizer import Tokenizer, check_fits
from nemotron_h.training.metrics import Metrics
from nemotron_h.training.optimizer import load_state_tensors, optimizers, set_learning_rate, state_tensors
from nemotron_h.training.schedule import schedule
from nemotron_h.training.step import Loss, next_token_loss, total_loss, train_step

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
COMPUTE = {Precision.BFLOAT16: torch.bfloat16, Precision.FLOAT32: torch.float32}


@dataclass(frozen=True)
class Progress:
    """What a step tells whoever watches; with the gradient's norm, a row of metrics.jsonl."""

    step: int  # steps done
    steps: int
    loss: float  # nats per token
    learning_rate_factor: float
    seconds: float
    tokens_per_second: float
    validation_loss: float | None  # nats per token, where this step measured it


@dataclass(frozen=True)
class Trained:
    """What a run leaves."""

    model: Hybrid
    checkpoint: Path
    step: int
    stopped_by: int | None  # the signal that asked it to stop: it goes on from the checkpoint; None: it is finished
    validation_nats: float  # over all of the held-out data, once finished
    validation_targets: int


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    batches: Batches,
    validation: Callable[[int | None], Iterable[Batch]],
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    loss_of: Loss = next_token_loss,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Trained:
    """Train to the last step, from the newest checkpoint in folder where there is one.

    validation(limit): the held-out batches, at most limit windows of them, None for all. SIGINT and SIGTERM finish the
    step, save and return. Raises: CheckpointError where the folder holds a run of other settings, or is in use.
    """
    if tokenizer is not None:
        check_fits(tokenizer, model_config.vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder):
        settings = {
            "model": to_mapping(model_config),
            "data": batches.identity,
            "tokenizer": tokenizer.digest if tokenizer is not None else None,
        }
        run = _Run(model_config, config, to_mapping(config) | settings, folder / CHECKPOINTS, tokenizer)
        metrics = Metrics(folder / METRICS, run.step)
        with stop_signals() as received:
            while run.step < config.steps and not received:
                progress, gradient_norm = run.advance(batches, validation, loss_of)
                metrics.add(**asdict(progress), gradient_norm=gradient_norm)
                watch(progress)
                if run.step % config.checkpoint_every_steps == 0:
                    run.save()
            path = run.save()
        if received:
            return Trained(run.model, path, run.step, received[0], 0.0, 0)
        nats, targets = total_loss(run.model, validation(None), loss_of)
        return Trained(run.model, path, run.step, None, nats, targets)


class _Run:
    """The model, its optimizers and where they stand: fresh from the seed, or from a checkpoint."""

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        settings: Mapping[str, Any],
        folder: Path,
        tokenizer: Tokenizer | None,
    ) -> None:
        """settings: what must not change between two halves of a run."""
        self.config, self.settings, self.folder, self.tokenizer = config, settings, folder, tokenizer
        self.factor = schedule(config)
        self.model = Hybrid(model_config, dtype=torch.float32, compute_dtype=COMPUTE[config.precision])
        self.step, self.place = 0, 0
        self.saved: Path | None = newest_step(folder)
        if self.saved is None:
            initialise(self.model, config.seed, zero_outputs=config.zero_outputs)
            self.optimizers = optimizers(self.model, config)
        else:
            self._go_on_from(self.saved)

    def _go_on_from(self, checkpoint: Path) -> None:
        tensors, values = read_step(checkpoint)
        if changed := first_difference(values["settings"], self.settings):
            key, before, now = changed
            raise CheckpointError(
                f"{key}: must be {before!r} to go on from {checkpoint}; got {now!r}; start another run for it"
            )
        for name, parameter in list(self.model.named_parameters()):
            master = tensors.pop(f"master.{name}", None)
            if master is None or master.shape != parameter.shape:
                got = "none" if master is None else f"shape {tuple(master.shape)}"
                raise CheckpointError(
                    f"master.{name}: must have shape {tuple(parameter.shape)} in {checkpoint}; got {got}; "
                    "remove that folder to go on from the one before"
                )
            put(self.model, name, master)
        self.optimizers = optimizers(self.model, self.config)
        self.step, self.place = values["step"], values["place"]
        load_state_tensors(self.model, self.optimizers, tensors, stepped=self.step > 0)

    def advance(
        self, batches: Batches, validation: Callable[[int | None], Iterable[Batch]], loss_of: Loss
    ) -> tuple[Progress, float]:
        """One step, and the validation that is due after it. Returns the gradient's norm beside what is watched."""
        config, factor = self.config, self.factor(self.step)
        began = time.perf_counter()
        set_learning_rate(self.optimizers, factor)
        places = [self.place + i * config.batch_size for i in range(config.accumulation)]
        result = train_step(self.model, self.optimizers, map(batches.at, places), loss_of, clip_norm=config.clip_norm)
        self.step, self.place = self.step + 1, self.place + config.accumulation * config.batch_size
        seconds = time.perf_counter() - began
        measured = None
        if self.step % config.validate_every_steps == 0:
            nats, targets = total_loss(self.model, validation(config.validation_windows), loss_of)
            measured = nats / targets if targets else None
        rate = config.step_tokens / seconds
        progress = Progress(self.step, config.steps, result.loss, factor, seconds, rate, measured)
        return progress, result.gradient_norm

    def save(self) -> Path:
        """The checkpoint of the step at hand, written unless it is there."""
        if self.saved != step_folder(self.folder, self.step):
            master = {f"master.{name}": p for name, p in self.model.named_parameters()}
            self.saved = save_step(
                self.folder,
                self.step,
                self.model,
                {**master, **state_tensors(self.model, self.optimizers)},
                {"step": self.step, "place": self.place, "settings": self.settings},
                tokenizer=self.tokenizer,
                keep=self.config.keep_checkpoints,
            )
        return self.saved
