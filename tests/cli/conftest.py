import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nemotron_h.checkpoint.save import save
from nemotron_h.cli.app import main
from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.text.bpe import train

COMMAND = "from nemotron_h.cli.app import main; main()"
CONFIG = ModelConfig.from_pattern(
    "M-*-",
    hidden_size=32,
    vocab_size=320,
    mamba=MambaConfig(num_heads=4, head_dim=16, state_size=16, num_groups=2),
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
    mlp=MlpConfig(intermediate_size=48),
)


@dataclass
class Ended:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on stderr, of a refusal."""
        assert self.code == 2, (self.code, self.out, self.err)
        [line] = self.err.splitlines()
        assert line.startswith("nemotron-h: ")
        return line.removeprefix("nemotron-h: ")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """The command line in this process: the same function as in its own, without two seconds of imports."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(gc, "set_threshold", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["nemotron-h", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit, warnings.catch_warnings():
            warnings.simplefilter("default")  # as in a process of its own
            main()
        out, err = capfd.readouterr()
        return Ended(exit.value.code if isinstance(exit.value.code, int) else 0, out, err)

    return run


@pytest.fixture
def process() -> Callable[..., Ended]:
    """The command line in a process of its own, with code before it."""

    def run(*arguments: object, before: str = "") -> Ended:
        line = [sys.executable, "-c", before + "\n" + COMMAND, *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """A model this small only waits for a second thread, most of all on a busy machine."""
    threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small files that a model can learn something from."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        body = "".join(
            f"def function_{number}_{i}(value):\n    return value * {i} + {number}\n\n" for i in range(20 + number)
        )
        (folder / f"file{number}.py").write_text(f'"""Number {number}."""\n\n{body}')
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A model that has learnt nothing, with a tokenizer; tests copy it before they damage it."""
    tokenizer = train([path.read_text() for path in corpus.iterdir()], TokenizerConfig(vocab_size=300))
    model = Hybrid(CONFIG)
    initialise(model, 0)
    with torch.no_grad():
        model.head_weight.mul_(8)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save(model, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process, unlike a power cut, loses nothing of what it wrote."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
