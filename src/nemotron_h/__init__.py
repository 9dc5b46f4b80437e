"""Nemotron-H: hybrid Mamba-2/Transformer language models, trained, saved and run by one arithmetic."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotron_h.checkpoint.save import save
    from nemotron_h.config.engine import EngineConfig
    from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
    from nemotron_h.config.presets import PRESETS
    from nemotron_h.config.sampling import Sampling
    from nemotron_h.errors import NemotronError
    from nemotron_h.inference.engine import Engine
    from nemotron_h.inference.load import LanguageModel, load
    from nemotron_h.inference.request import Request
    from nemotron_h.model.hybrid import Hybrid
    from nemotron_h.model.state import State
    from nemotron_h.text.tokenizer import Tokenizer

__version__ = "0.1.0"

# Loaded when first asked for: importing the package costs nothing, and no torch.
_HOMES = {
    "AttentionConfig": "config.model",
    "Engine": "inference.engine",
    "EngineConfig": "config.engine",
    "Hybrid": "model.hybrid",
    "LanguageModel": "inference.load",
    "MambaConfig": "config.model",
    "MlpConfig": "config.model",
    "ModelConfig": "config.model",
    "NemotronError": "errors",
    "PRESETS": "config.presets",
    "Request": "inference.request",
    "Sampling": "config.sampling",
    "State": "model.state",
    "Tokenizer": "text.tokenizer",
    "load": "inference.load",
    "save": "checkpoint.save",
}

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "Engine",
    "EngineConfig",
    "Hybrid",
    "LanguageModel",
    "MambaConfig",
    "MlpConfig",
    "ModelConfig",
    "NemotronError",
    "Request",
    "Sampling",
    "State",
    "Tokenizer",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'nemotron_h' has no attribute {name!r}")
    value = getattr(import_module(f"nemotron_h.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
