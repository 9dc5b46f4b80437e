"""Settings of a byte-level BPE tokenizer that is trained here."""

from nemotron_h.config.settings import settings
from nemotron_h.errors import ConfigError

CONTROL_NAMES = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2 in every tokenizer of the family
NUM_BYTES = 256


@settings
class TokenizerConfig:
    """What the ids mean: control tokens first, then the 256 bytes, then one id per merge."""

    vocab_size: int = 4096
    reserved_tokens: int = 13  # <SPECIAL_3>, <SPECIAL_4>, ...: each number is its id; chat templates take some
    sample_bytes: int = 32_000_000  # merges are learnt from documents up to this; which ones, their content decides

    def __post_init__(self) -> None:
        if self.reserved_tokens < 0:
            raise ConfigError(f"reserved_tokens: must not be negative; got {self.reserved_tokens}")
        if self.sample_bytes < 1:
            raise ConfigError(f"sample_bytes: must be positive; got {self.sample_bytes}")
        smallest = len(self.control_names) + NUM_BYTES
        if self.vocab_size < smallest:
            rule = f"must hold the control tokens and {NUM_BYTES} bytes, {smallest} in all"
            raise ConfigError(f"vocab_size: {rule}; got {self.vocab_size}")

    @property
    def control_names(self) -> list[str]:
        """Names of the control tokens, in the order of their ids."""
        first = len(CONTROL_NAMES)
        return [*CONTROL_NAMES, *(f"<SPECIAL_{i}>" for i in range(first, first + self.reserved_tokens))]
