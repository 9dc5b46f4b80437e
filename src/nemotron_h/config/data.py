"""Settings of a corpus: which files become documents, and which of those are held out."""

from pathlib import Path
from typing import Annotated

from nemotron_h.config.settings import Lenient, settings
from nemotron_h.errors import ConfigError


@settings
class CorpusConfig:
    """Which files become documents, and how many are held out."""

    source: Annotated[Path | None, Lenient] = None  # a folder; None: the standard library of this Python
    suffixes: Annotated[tuple[str, ...], Lenient] = (".py", ".rst", ".txt")
    excluded_folders: Annotated[tuple[str, ...], Lenient] = ("__pycache__", "dist-packages", "site-packages")
    max_document_bytes: int = 1_000_000  # longer files are tables, not prose; left out and counted
    validation_fraction: float = 0.03  # of the documents' bytes, chosen by content
    near_copy_fraction: float = 0.5  # a held-out document is a near copy when one training document holds this much

    def __post_init__(self) -> None:
        if not self.suffixes or not all(suffix.startswith(".") for suffix in self.suffixes):
            raise ConfigError(f'suffixes: must be endings such as ".py", one at least; got {self.suffixes}')
        if self.max_document_bytes < 1:
            raise ConfigError(f"max_document_bytes: must be positive; got {self.max_document_bytes}")
        for name in ("validation_fraction", "near_copy_fraction"):
            fraction = getattr(self, name)
            if not 0 < fraction < 1:
                raise ConfigError(f"{name}: must lie between 0 and 1, both excluded; got {fraction}")
