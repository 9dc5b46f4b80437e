"""README.md, the model card: what a checkpoint was made from, under which licence, and what made it.

What a parent's card states is carried; nothing is stated that no one stated. Where the parent is a repository of the
Hub, it is the base model; where it is a local folder, the base model of its own card is.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from nemotron_h.config.keys import short, shown
from nemotron_h.errors import CheckpointError

CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
TAGS = ["nemotron-h", "mamba-2", "hybrid"]
MOST_CHARACTERS = 2**16  # of a parent's card that are looked at: its front matter comes first


def card(
    *, made_by: str, parent: str | None, parent_card: str | None, library: str | None, integers: str | None = None
) -> str:
    """The text of README.md.

    made_by: the command or function; parent: the Hub's name of the checkpoint it was made from, or a folder's;
    parent_card: that checkpoint's own README.md; library: a program that loads it, beside this one; integers: int8 or
    int4, where the matrices are so, and this program alone loads it.
    Raises: CheckpointError where the parent's card cannot be read.
    """
    from huggingface_hub import ModelCardData  # noqa: PLC0415 - who loads a model does not wait for it

    stated = front_matter(parent_card) if parent_card is not None else {}
    licence = {key: stated[key] for key in LICENCE_KEYS if key in stated}
    base = parent if parent is not None and "/" in parent else stated.get("base_model")
    version = import_module("nemotron_h").__version__  # by name: the package's own imports are upstairs
    data = ModelCardData(base_model=base, library_name=library, pipeline_tag="text-generation", tags=TAGS, **licence)
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        "# A Nemotron-H model",
        "",
        f"- Made by `{shown(made_by)}`: nemotron_h {version}, torch {torch.__version__}.",
        f"- Made from {shown(parent)}." if parent is not None else "- Made from no other checkpoint.",
        *([f"- Matrices in {integers} of nemotron_h, which alone loads them."] if integers is not None else []),
        f"- Licence: {_said(licence)}.",
        "",
    ]
    return "\n".join(lines)


def front_matter(text: str) -> dict[str, Any]:
    """What a card states of LICENCE_KEYS and base_model: strings, or lists of them. Without front matter, nothing."""
    from huggingface_hub import ModelCard  # noqa: PLC0415 - as above

    whole, text = text, text.removeprefix("\ufeff").lstrip()[:MOST_CHARACTERS]
    if not text.startswith("---"):
        return {}
    if len(whole) > MOST_CHARACTERS and not re.search(r"[\r\n]---", text):  # cut short, it would state nothing
        raise CheckpointError(f"{CARD}: front matter must be at most {MOST_CHARACTERS:,} characters; got more; mend it")
    try:
        data = ModelCard(text).data
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{CARD}: front matter must be YAML of a model card; got {reason:.100}; mend it"
        ) from None
    found = {key: value for key in (*LICENCE_KEYS, "base_model") if (value := data.get(key)) is not None}
    for key, value in found.items():
        if not all(isinstance(part, str) for part in (value if isinstance(value, list) else [value])):
            raise CheckpointError(f"{CARD}: {key} must be a string or a list of them; got {short(value)}; mend it")
    return found


def parent_name(folder: Path) -> str:
    """`org/name` where the folder lies in the Hub's cache, else the folder's own name."""
    for part in reversed(folder.resolve().parts):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return folder.resolve().name


def _said(licence: dict[str, Any]) -> str:
    """The licence in a sentence."""
    if not licence:
        return "none is stated"
    name = licence.get("license_name") or licence.get("license", "see the link")
    link = licence.get("license_link")
    return " ".join(f"{name}, {link}".split()) if link else " ".join(f"{name}".split())
