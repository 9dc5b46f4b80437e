"""The training loop: steps, validation, checkpoints, and an end at any moment from which it goes on to the same bits.

A run's folder holds `metrics.jsonl` and `checkpoints/step-N`. What a checkpoint remembers besides weights and moments
is two integers: the step, and the place in the data (windows read so far). Everything random follows from the seed and
those, so a run that was killed and one that was not end in the same bits (same machine, threads and torch).
"""

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from nemotron_h.checkpoint.load import put
from nemotron_h.checkpoint.resume import newest_step, read_step, save_step
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.train import Precision, TrainConfig
from nemotron_h.data.batches import Batch, Batches
from nemotron_h.errors import CheckpointError
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.text.tokenizer import Tokenizer
from nemotron_h.training.metrics import Metrics
from nemotron_h.training.optimizer import load_state_tensors, optimizers, set_learning_rate, state_tensors
from nemotron_h.training.schedule import schedule
from nemotron_h.training.step import Loss, next_token_loss, total_loss, train_step

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
COMPUTE = {Precision.BFLOAT16: torch.bfloat16, Precision.FLOAT32: torch.float32}


@dataclass(frozen=True)
class Progress:
    """What a step tells whoever watches."""

    step: int  # steps done
    steps: int
    loss: float  # nats per token
    learning_rate_factor: float
    tokens_per_second: float
    validation_loss: float | None  # nats per token, where this step measured it


@dataclass(frozen=True)
class Trained:
    """What a run leaves."""

    model: Hybrid
    checkpoint: Path
    step: int
    finished: bool  # False: it was asked to stop, and goes on from the checkpoint
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
    step, save and return. Raises: CheckpointError where the folder holds a run of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(model_config, config, folder, tokenizer)
    factor = schedule(config)
    metrics = Metrics(folder / METRICS, run.step)
    with stop_signals() as stopped:
        while run.step < config.steps and not stopped:
            began = time.perf_counter()
            set_learning_rate(run.optimizers, factor(run.step))
            places = [run.place + i * config.batch_size for i in range(config.accumulation)]
            result = train_step(run.model, run.optimizers, map(batches.at, places), loss_of, clip_norm=config.clip_norm)
            run.step, run.place = run.step + 1, run.place + config.accumulation * config.batch_size
            seconds = time.perf_counter() - began
            measured = None
            if run.step % config.validate_every_steps == 0:
                nats, targets = total_loss(run.model, validation(config.validation_windows), loss_of)
                measured = nats / targets if targets else None
            progress = Progress(
                run.step, config.steps, result.loss, factor(run.step - 1), config.step_tokens / seconds, measured
            )
            metrics.add(**asdict(progress), gradient_norm=result.gradient_norm, seconds=seconds)
            watch(progress)
            if run.step % config.checkpoint_every_steps == 0:
                run.save()
        path = run.save()
        finished = run.step == config.steps
        nats, targets = total_loss(run.model, validation(None), loss_of) if finished else (0.0, 0)
    return Trained(run.model, path, run.step, finished, nats, targets)


class _Run:
    """The model, its optimizers and where they stand: fresh from the seed, or from a checkpoint."""

    def __init__(
        self, model_config: ModelConfig, config: TrainConfig, folder: Path, tokenizer: Tokenizer | None
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.folder = folder / CHECKPOINTS
        self.model = Hybrid(model_config, dtype=torch.float32, compute_dtype=COMPUTE[config.precision])
        self.step, self.place = 0, 0
        self.saved: Path | None = newest_step(self.folder)
        if self.saved is None:
            initialise(self.model, config.seed)
            self.optimizers = optimizers(self.model, config)
            return
        tensors, values = read_step(self.saved)
        self._check(values)
        for name, _ in list(self.model.named_parameters()):
            if f"master.{name}" not in tensors:
                raise CheckpointError(f"master.{name}: missing from {self.saved}; go on from an older checkpoint")
            put(self.model, name, tensors[f"master.{name}"])
        self.optimizers = optimizers(self.model, config)
        load_state_tensors(self.model, self.optimizers, tensors)
        self.step, self.place = values["step"], values["place"]

    def _check(self, values: dict[str, Any]) -> None:
        ours = self._settings()
        for key, theirs in values["settings"].items():
            if ours.get(key) != theirs:
                raise CheckpointError(
                    f"{key}: must be {theirs!r} to go on from {self.saved}; got {ours.get(key)!r}; "
                    "start another run for other settings"
                )

    def _settings(self) -> dict[str, Any]:
        """What must not change between two halves of a run."""
        return {
            key: str(value) if isinstance(value, Precision) else value for key, value in asdict(self.config).items()
        }

    def save(self) -> Path:
        """The checkpoint of the step at hand, written unless it is there."""
        path = self.folder / f"step-{self.step:08d}"
        if self.saved == path:
            return path
        master = {f"master.{name}": p for name, p in self.model.named_parameters()}
        self.saved = save_step(
            self.folder,
            self.step,
            self.model,
            {**master, **state_tensors(self.model, self.optimizers)},
            {"step": self.step, "place": self.place, "settings": self._settings()},
            tokenizer=self.tokenizer,
            keep=self.config.keep_checkpoints,
        )
        return self.saved


@contextmanager
def stop_signals() -> Iterator[Sequence[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second SIGINT interrupts as usual."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
