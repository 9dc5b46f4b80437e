"""How an engine takes its machine: what runs at once, what memory it may fill, what it keeps for reuse."""

import math
from pathlib import Path
from typing import Annotated

from nemotron_h.config.settings import Lenient, settings
from nemotron_h.errors import ConfigError

DRAFTS = ("auto", "always", "off")


@settings
class EngineConfig:
    """Settings of a serving engine. None of them changes a token: they decide speed, memory and what is reused."""

    max_running: int = 16  # sequences computed at once; more wait
    memory_bytes: int | None = None  # of pages and slots together; None: of what is free when the engine is made
    pages_fraction: float = 0.5  # of that memory, without the running sequences' slots; snapshots have the rest
    max_snapshots: int = 4096
    portion_tokens: int = 512  # of prompts, read in one pass between two tokens of everybody else
    reuse: bool = True
    drafts: str = "auto"  # what followed before is read ahead of its coming: where it pays, "always", or "off"
    snapshot_folder: Annotated[Path | None, Lenient] = None  # keeps what memory has no room for; None: nothing does
    snapshot_folder_bytes: int = 2**33
    audit_fraction: float = 0.0  # of hits, computed cold as well and compared to the bit
    poisoned: bool = False  # what is freed is filled with NaN, so that a reader of it shows; for tests

    def __post_init__(self) -> None:
        for name, least in (
            ("max_running", 1),
            ("max_snapshots", 0),
            ("portion_tokens", 1),
            ("snapshot_folder_bytes", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: must be {least} or above; got {getattr(self, name)}")
        if self.drafts not in DRAFTS:
            raise ConfigError(f"drafts: must be one of {', '.join(DRAFTS)}; got {self.drafts!r}")
        if self.snapshot_folder is not None and not self.reuse:
            raise ConfigError("snapshot_folder: needs reuse, which is off; leave it out, or reuse what is read")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ConfigError(f"memory_bytes: must be 1 or above, or None; got {self.memory_bytes}")
        for name in ("pages_fraction", "audit_fraction"):
            if not (math.isfinite(value := getattr(self, name)) and 0 <= value <= 1):
                raise ConfigError(f"{name}: must lie in 0..1; got {value}")
