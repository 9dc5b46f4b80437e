"""A run that is stopped anywhere and gone on with ends in the bits of one that was not."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nemotron_h.checkpoint.load import load
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.published import write_config
from nemotron_h.config.settings import to_mapping
from nemotron_h.config.train import Decay, Optimizer, Precision, TrainConfig
from nemotron_h.data.batches import Batches
from nemotron_h.data.shards import Shard, ShardWriter
from nemotron_h.errors import CheckpointError
from nemotron_h.training import loop
from nemotron_h.training.loop import Progress, Trained, train
from nemotron_h.training.metrics import rows

Run = Callable[..., Trained]
ADAMW: dict[str, Any] = {"optimizer": Optimizer.ADAMW, "precision": Precision.BFLOAT16}
MUON: dict[str, Any] = {"optimizer": Optimizer.MUON, "matrix_learning_rate": 0.02}
LAST = Path("checkpoints") / "step-00000040"


def hashes(folder: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256((folder / LAST / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "training.safetensors", "training.json", "config.json")
    }


def told(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock says."""
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")}
        for row in rows(folder / "metrics.jsonl")
    ]


def lives(shard: Shard, folder: Path, config: TrainConfig, model: ModelConfig, count: int, *moments: str) -> list[int]:
    described = folder.with_name("config.json")
    write_config(model, described)
    arguments = [str(count), shard.name, folder, json.dumps(to_mapping(config)), described, *moments]
    script = Path(__file__).with_name("interrupted.py")
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("changes", "count", "kills"),
    [
        (ADAMW, 1, 3),
        pytest.param(ADAMW, 1, 6, marks=pytest.mark.slow),
        pytest.param(
            MUON | {"accumulation": 2, "decay": Decay.STABLE, "decay_fraction": 0.5}, 2, 6, marks=pytest.mark.slow
        ),
    ],
    ids=["adamw", "adamw, more often", "muon on two threads"],
)
def test_killed_again_and_again_it_ends_in_the_same_bits(
    run: Run,
    shard: Shard,
    settings: TrainConfig,
    model_config: ModelConfig,
    tmp_path: Path,
    threads: Callable[[int], None],
    changes: dict[str, Any],
    count: int,
    kills: int,
) -> None:
    threads(count)
    run(tmp_path / "whole", **changes)
    draw = random.Random(11)
    moments = [
        f"step:{draw.randint(1, 6)}",  # before there is a checkpoint
        f"write:{draw.randint(1, 2)}",
        f"timer:{draw.uniform(0.01, 0.06):.3f}",
        "rename:1",
        "remove:1",
        f"step:{draw.randint(36, 39)}",
    ]
    moments = moments[: kills - 1] + moments[-1:]
    ends = lives(shard, tmp_path / "killed", replace(settings, **changes), model_config, count, *moments, "end")
    assert ends == [-signal.SIGKILL] * kills + [0]
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert [row["step"] for row in told(tmp_path / "killed")] == list(range(1, 41))
    assert told(tmp_path / "killed") == told(tmp_path / "whole")
    left = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert left == ["step-00000035", "step-00000040"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_next_run_goes_on(run: Run, tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def stop(progress: Progress) -> None:
        if progress.step == 16:
            os.kill(os.getpid(), number)

    stopped = run(tmp_path / "stopped", watch=stop)
    assert (stopped.step, stopped.stopped_by) == (16, number)
    assert stopped.checkpoint.name == "step-00000016"
    assert signal.getsignal(number) is before
    ended = run(tmp_path / "stopped")
    whole = run(tmp_path / "whole")
    assert (ended.step, ended.stopped_by) == (40, None)
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")
    assert told(tmp_path / "stopped") == told(tmp_path / "whole")
    assert ended.validation_nats == whole.validation_nats
    # finished: a third run trains nothing
    assert run(tmp_path / "stopped", watch=lambda progress: pytest.fail("trained")).step == 40


def test_a_second_interrupt_interrupts(run: Run, tmp_path: Path) -> None:
    def impatient(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, watch=impatient)


def test_an_interrupt_after_sigterm_still_saves(run: Run, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    trained = run(tmp_path, watch=stop)
    assert trained.stopped_by == signal.SIGTERM
    assert trained.checkpoint.name == "step-00000001"


def test_a_signal_before_the_first_step_is_gone_on_from(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped:
        def __enter__(self) -> list[int]:
            return [signal.SIGTERM]

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(loop, "stop_signals", Stopped)
    assert run(tmp_path / "a").checkpoint.name == "step-00000000"
    monkeypatch.undo()
    run(tmp_path / "a")
    run(tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: must be 0.003 to go on from"),
        (MUON, "matrix_learning_rate: must be None"),
        ({"steps": 50}, "steps: must be 40"),
        ({"model": {"norm_epsilon": 1e-3}}, "model.norm_epsilon: must be 1e-05"),
        ({"model": {"layers": -1}}, "model.layers.3.intermediate_size: must be 48"),
    ],
)
def test_other_settings_are_refused_by_name(
    run: Run, model_config: ModelConfig, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    def stop(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    run(tmp_path, watch=stop)
    changes = dict(changes)
    if model := changes.pop("model", None):
        model = {"layers": model_config.layers[:-1]} if "layers" in model else model
        changes["model"] = replace(model_config, **model)
    with pytest.raises(CheckpointError, match=f"^{words}.*step-00000001"):
        run(tmp_path, **changes)


def test_other_data_is_refused(
    run: Run, shard: Shard, tmp_path: Path, settings: TrainConfig, model_config: ModelConfig
) -> None:
    def stop(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    run(tmp_path, watch=stop)
    with ShardWriter(tmp_path / "other", vocab_size=64) as writer:
        for begin, end in pairwise(shard.document_starts):
            writer.add_document([(int(token) + 1) % 64 for token in shard.tokens[begin:end]])
    other = Shard(tmp_path / "other")
    for batches, name in (
        (Batches(other, 32, settings.batch_size, settings.seed), "data.shard"),
        (Batches(shard, 32, settings.batch_size, settings.seed + 1), "data.order_seed"),
    ):
        with pytest.raises(CheckpointError, match=f"^{name}: must be"):
            train(model_config, settings, batches, lambda limit: [], tmp_path)


def test_another_tokenizer_is_refused(run: Run, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    run(tmp_path, watch=stop)
    path = tmp_path / "checkpoints" / "step-00000001" / "training.json"
    values = json.loads(path.read_text())
    assert values["settings"]["tokenizer"] is None
    values["settings"]["tokenizer"] = "of another"
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"^tokenizer: must be 'of another'"):
        run(tmp_path)


def test_validation_of_all_windows_equals_the_definition(run: Run, shard: Shard, tmp_path: Path) -> None:
    """Each window by itself, each document in it by itself, the log-probabilities in float64."""
    trained = run(tmp_path, steps=8)
    tokens = torch.from_numpy(shard.tokens.astype("int64"))
    starts = shard.document_starts
    nats, targets, length = 0.0, 0, 32
    with torch.no_grad():
        for begin in range(0, len(tokens) - 1, length):
            end = min(begin + length, len(tokens) - 1)
            cuts = sorted({begin, end, *(int(start) for start in starts if begin < start < end)})
            for low, high in pairwise(cuts):
                inside = high not in starts  # else the next token is another document's
                wanted = tokens[low + 1 : high + inside]
                logits = trained.model(tokens[None, low:high])[0, : len(wanted)].double()
                nats += float(F.cross_entropy(logits, wanted, reduction="sum")) if len(wanted) else 0.0
                targets += len(wanted)
    assert trained.validation_targets == targets == len(tokens) - len(shard)
    assert trained.validation_nats == pytest.approx(nats, rel=1e-5)  # float32 logits and sums


def test_it_learns(run: Run, tmp_path: Path) -> None:
    trained = run(tmp_path)
    # one of two follows each token: ln 2 at best, ln 64 knowing nothing
    assert trained.validation_nats / trained.validation_targets < 3.4
    measured = [row["validation_loss"] for row in told(tmp_path)]
    assert [step for step, loss in enumerate(measured, 1) if loss is not None] == [10, 20, 30, 40]


def test_the_checkpoint_is_the_model(run: Run, tmp_path: Path) -> None:
    trained = run(tmp_path, steps=3, precision=Precision.BFLOAT16)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(load(trained.checkpoint)(tokens), trained.model.eval()(tokens))


def test_two_runs_in_one_folder(run: Run, tmp_path: Path) -> None:
    def again(progress: Progress) -> None:
        run(tmp_path)

    with pytest.raises(CheckpointError, match="must not be in use"):
        run(tmp_path, watch=again)


def test_damaged_moments_are_named(run: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained = run(tmp_path)
    path = trained.checkpoint / "training.safetensors"
    whole = load_file(path)
    for name, tensor in {
        "master.lm_head.weight": None,
        "master.backbone.norm_f.weight": torch.zeros(3),
        "exp_avg.lm_head.weight": None,
        "exp_avg_sq.lm_head.weight": torch.zeros(3),
        "exp_avg.nothing": torch.zeros(3),
    }.items():
        changed = {key: value for key, value in whole.items() if key != name}
        save_file(changed if tensor is None else changed | {name: tensor}, path)
        with pytest.raises(CheckpointError, match=f"^{name}: "):
            run(tmp_path)
