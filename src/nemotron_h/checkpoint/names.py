"""What the weights are called on disk: their files, and each tensor by the published names, which are the model's own,
or by transformers' for the same.

backbone.layers.7.mixer.q_proj.weight      NVIDIA's files, and what transformers' save_pretrained writes
model.layers.7.mixer.q_proj.weight         transformers' modules
"""

from collections.abc import Iterable

from nemotron_h.config.keys import shown
from nemotron_h.config.published import Dialect
from nemotron_h.errors import CheckpointError

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PREFIXES = {Dialect.PUBLISHED: "backbone.", Dialect.TRANSFORMERS: "model."}
EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"


def stored_name(name: str, dialect: Dialect) -> str:
    """What a published name becomes in a checkpoint of that dialect."""
    return _with_prefix(name, PREFIXES[Dialect.PUBLISHED], PREFIXES[dialect])


def published_names(stored: Iterable[str]) -> dict[str, str]:
    """Published name -> the name it is stored under. Raises: CheckpointError where two are the same tensor's."""
    names: dict[str, str] = {}
    for name in stored:
        published = _with_prefix(name, PREFIXES[Dialect.TRANSFORMERS], PREFIXES[Dialect.PUBLISHED])
        if published in names:
            raise CheckpointError(f"{shown(name)}: must be there once; got {shown(names[published])} beside it")
        names[published] = name
    return names


def _with_prefix(name: str, before: str, after: str) -> str:
    return after + name.removeprefix(before) if name.startswith(before) else name
