"""A model is a tuple of layer configs, and the few numbers they share.

The pattern string of the papers is one way to write the tuple (`pattern.py`); a Transformer, a pure state-space model
and a pruned hybrid are just other tuples.
"""

import math
from typing import Annotated, Any, Self

from nemotron_h.config.pattern import ATTENTION, MAMBA, MLP, read_pattern
from nemotron_h.config.settings import Lenient, settings
from nemotron_h.errors import ConfigError


@settings
class MambaConfig:
    """One Mamba-2 layer."""

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int  # heads in a group share B and C
    conv_kernel: int = 4
    time_step_limit: Annotated[tuple[float, float], Lenient] = (0.0, math.inf)  # dt is clamped to it
    chunk_size: int = 128  # read and written back for other programs; our own grid steers ours

    def __post_init__(self) -> None:
        positive(self, "num_heads", "head_dim", "state_size", "num_groups", "chunk_size")
        if self.num_heads % self.num_groups:
            raise ConfigError(f"mamba.num_groups: must divide num_heads; got {self.num_groups} and {self.num_heads}")
        if self.conv_kernel < 2:
            raise ConfigError(f"mamba.conv_kernel: must be 2 or more; got {self.conv_kernel}")
        low, high = self.time_step_limit
        if not 0 <= low < high:
            raise ConfigError(f"mamba.time_step_limit: must be 0 <= low < high; got ({low}, {high})")

    @property
    def inner_size(self) -> int:
        """Channels of x, z and y. Never derived from the hidden size: no fixed expansion holds in the family."""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of x, B and C, side by side."""
        return self.inner_size + 2 * self.num_groups * self.state_size


@settings
class AttentionConfig:
    """One self-attention layer with grouped queries. The family has no position embedding; baselines may have RoPE."""

    num_heads: int
    num_kv_heads: int
    head_dim: int  # never hidden_size / num_heads: in the 4B and the 9B they differ
    rope_base: float | None = None  # None: no position embedding
    rope_fraction: float = 1.0  # of head_dim that is rotated

    def __post_init__(self) -> None:
        positive(self, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"attention.num_kv_heads: must divide num_heads; got {self.num_kv_heads} and {self.num_heads}"
            )
        if self.rope_base is None:
            if self.rope_fraction != 1:
                raise ConfigError(f"attention.rope_fraction: must be 1 without rope_base; got {self.rope_fraction}")
            return
        if not 1 < self.rope_base < math.inf:
            raise ConfigError(f"attention.rope_base: must be above 1; got {self.rope_base}")
        exact = self.head_dim * self.rope_fraction
        if not 0 < self.rope_fraction <= 1 or abs(exact - self.rope_width) > 1e-6 or self.rope_width % 2:
            raise ConfigError(
                f"attention.rope_fraction: must rotate an even number of 1 to {self.head_dim} channels; "
                f"got {self.rope_fraction}, which rotates {exact:g}"
            )

    @property
    def rope_width(self) -> int:
        """Channels of a head that RoPE rotates."""
        return round(self.head_dim * self.rope_fraction)


@settings
class MlpConfig:
    """One feed-forward layer: down(relu(up x)^2)."""

    intermediate_size: int

    def __post_init__(self) -> None:
        positive(self, "intermediate_size")


LayerConfig = MambaConfig | AttentionConfig | MlpConfig


@settings
class ModelConfig:
    """A whole model: what each layer is, and what all layers share."""

    layers: Annotated[tuple[LayerConfig, ...], Lenient]
    hidden_size: int
    vocab_size: int
    norm_epsilon: float = 1e-5
    tied_embeddings: bool = False
    max_positions: int = 8192  # what it was trained on; nothing here stops at it
    bos_token_id: int = 1
    eos_token_ids: Annotated[tuple[int, ...], Lenient] = (2,)
    pad_token_id: int | None = 0  # other programs pad with it

    def __post_init__(self) -> None:
        positive(self, "hidden_size", "vocab_size", "max_positions")
        if not self.layers:
            raise ConfigError("layers: must hold at least one layer; got none")
        if not 0 < self.norm_epsilon < 1:
            raise ConfigError(f"norm_epsilon: must lie between 0 and 1; got {self.norm_epsilon}")
        for name, ids in (
            ("bos_token_id", (self.bos_token_id,)),
            ("eos_token_ids", self.eos_token_ids),
            ("pad_token_id", () if self.pad_token_id is None else (self.pad_token_id,)),
        ):
            for token in ids:
                if not 0 <= token < self.vocab_size:
                    raise ConfigError(f"{name}: must lie in 0..vocab_size-1 = {self.vocab_size - 1}; got {token}")

    @classmethod
    def from_pattern(
        cls,
        pattern: str,
        *,
        hidden_size: int,
        vocab_size: int,
        mamba: MambaConfig | None = None,
        attention: AttentionConfig | None = None,
        mlp: MlpConfig | None = None,
        **shared: Any,
    ) -> Self:
        """One config for all layers of a kind, laid out by a pattern (`M-M*-`); shared: ModelConfig's other fields."""
        kinds: dict[str, LayerConfig | None] = {MAMBA: mamba, ATTENTION: attention, MLP: mlp}
        layers = []
        for index, letter in enumerate(read_pattern(pattern)):
            layer = kinds[letter]
            if layer is None:
                raise ConfigError(f"pattern: layer {index} is {letter!r}, whose config must be given; got None")
            layers.append(layer)
        return cls(
            layers=tuple(layers),
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            **shared,
        )

    @property
    def pattern(self) -> str:
        """The layers' kinds as one letter each."""
        letters = {MambaConfig: MAMBA, AttentionConfig: ATTENTION, MlpConfig: MLP}
        return "".join(letters[type(layer)] for layer in self.layers)


def positive(config: object, *names: str) -> None:
    """Refuse a size below one."""
    for name in names:
        if getattr(config, name) < 1:
            where = {MambaConfig: "mamba.", AttentionConfig: "attention.", MlpConfig: "mlp."}.get(type(config), "")
            raise ConfigError(f"{where}{name}: must be at least 1; got {getattr(config, name)}")
