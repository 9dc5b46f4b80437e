from collections.abc import Callable

import pytest
import torch

from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise

TINY = ModelConfig.from_pattern(
    "M-*-",
    hidden_size=32,
    vocab_size=96,
    mamba=MambaConfig(num_heads=4, head_dim=16, state_size=16, num_groups=2),
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
    mlp=MlpConfig(intermediate_size=48),
)


@pytest.fixture
def config() -> ModelConfig:
    return TINY


@pytest.fixture
def build() -> Callable[..., Hybrid]:
    """A model with weights; every gain, bias and conv tap moved off its simple first value."""

    def model_of(config: ModelConfig = TINY, *, seed: int = 0, compute_dtype: torch.dtype | None = None) -> Hybrid:
        model = Hybrid(config, dtype=torch.float32, compute_dtype=compute_dtype)
        initialise(model, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    return model_of


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """A model this small only waits for a second thread, most of all on a busy machine."""
    threads(1)
