"""One run, killed again and again: `python interrupted.py SHARD FOLDER SETTINGS CONFIG.JSON MOMENT...`.

Each moment is one life of the run, in a process of its own. Prints how each ended, as JSON.

    step:N      SIGKILL after step N of the run
    timer:S     SIGKILL S seconds after the first step of that life, wherever it is
    write:N     SIGKILL inside the Nth checkpoint of that life: half of its tensors are in the file
    rename:N    SIGKILL before the Nth checkpoint takes its name
    remove:N    SIGKILL while the Nth old checkpoint is removed
    end         goes on to the last step
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from nemotron_h.checkpoint import files, resume
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.published import read_config
from nemotron_h.config.settings import from_mapping
from nemotron_h.config.train import TrainConfig
from nemotron_h.data.batches import Batches, windows
from nemotron_h.data.shards import Shard
from nemotron_h.training.loop import Progress, train


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(count: int, real, last):
    """A function that is real until its call number `count`, which is last."""
    calls = 0

    def wrapped(*args, **options):
        nonlocal calls
        calls += 1
        return (last if calls == count else real)(*args, **options)

    return wrapped


def half_written(tensors, path, **options) -> None:
    whole = Path(path).with_name("whole")
    real_save(tensors, whole, **options)
    content = whole.read_bytes()
    whole.unlink()
    Path(path).write_bytes(content[: len(content) // 2])
    die()


def half_removed(path, **options) -> None:
    (path / resume.VALUES).unlink(missing_ok=True)
    die()


real_save = resume.save_file


def arrange(moment: str):
    """What each step is told, once the moment's trap is laid."""
    kind, _, number = moment.partition(":")

    def watch(progress: Progress) -> None:
        if kind == "timer" and not timers:
            timers.append(threading.Timer(float(number), die))
            timers[0].start()
        if kind == "step" and progress.step == int(number):
            die()

    timers: list[threading.Timer] = []
    if kind == "write":
        resume.save_file = after(int(number), real_save, half_written)
    if kind == "rename":
        real = Path.rename
        renamed = after(int(number), real, lambda *args: die())
        Path.rename = lambda self, target: renamed(self, target) if "partial" in self.name else real(self, target)
    if kind == "remove":
        files.shutil.rmtree = removing(int(number))
    return watch


def removing(count: int):
    """rmtree that dies at its count-th folder: `new_folder` calls it too, for what is not there."""
    real = files.shutil.rmtree
    last = after(count, real, half_removed)
    return lambda path, **options: (last if Path(path).exists() else real)(path, **options)


def live(shard: Shard, folder: Path, config: TrainConfig, model: ModelConfig, moment: str) -> None:
    watch = arrange(moment)
    batches = Batches(shard, config.sequence_length, config.batch_size, config.seed)
    held_out = lambda limit: windows(shard, config.sequence_length, 3, limit=limit)  # noqa: E731
    train(model, config, batches, held_out, folder, watch=watch)


def main(threads: str, name: str, folder: str, settings: str, model: str, *moments: str) -> None:
    shard = Shard(Path(name))
    config = from_mapping(TrainConfig, json.loads(settings))
    model_config = read_config(Path(model))
    torch.set_num_threads(int(threads))
    os.fsync = lambda handle: None  # a killed process, unlike a power cut, loses nothing of what it wrote
    ends = []
    for moment in moments:
        child = os.fork()  # nothing has computed yet, so there is no thread to lose
        if child == 0:
            live(shard, Path(folder), config, model_config, moment)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        ends.append(os.waitstatus_to_exitcode(status))
    sys.stdout.write(json.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
