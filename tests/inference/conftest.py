from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemotron_h.checkpoint.save import save
from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.inference.load import PRECISIONS
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.precision.weights import BITS
from nemotron_h.text.bpe import train
from nemotron_h.text.tokenizer import Tokenizer
from tests.model.shapes import as_engines_find_it, in_integers

PROSE = "Grüße aus Köln: 你好, 世界! Привет, мир. 🙂👩‍👧 the hybrid writes what it has read\n"
CONFIG = ModelConfig.from_pattern(
    "M-*M-",
    hidden_size=32,
    vocab_size=352,  # padded beyond the tokenizer's 320
    mamba=MambaConfig(num_heads=4, head_dim=16, state_size=16, num_groups=2),
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
    mlp=MlpConfig(intermediate_size=48),
)


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """A model this small only waits for a second thread, most of all on a busy machine."""
    threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train([PROSE * 20], TokenizerConfig(vocab_size=320, reserved_tokens=2))


@pytest.fixture
def build() -> Callable[..., Hybrid]:
    """A model whose logits differ enough that the next token is not a coin's toss."""

    def model_of(*, precision: str = "float32", seed: int = 0) -> Hybrid:
        compute_dtype = PRECISIONS.get(precision, torch.bfloat16)
        dtype = compute_dtype if precision in BITS else torch.float32
        model = Hybrid(CONFIG, dtype=dtype, compute_dtype=compute_dtype)
        initialise(model, seed)
        with torch.no_grad():
            model.head_weight.mul_(8)
        as_engines_find_it(model)
        if precision in BITS:
            in_integers(model, precision)
        return model.eval()

    return model_of


@pytest.fixture
def folder(build: Callable[..., Hybrid], tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save(build(), tmp_path / "m", tokenizer=tokenizer)
    return tmp_path / "m"
