"""What a checkpoint folder holds beside the model and its tokenizer, read by `load` and written by `save`.

generation_config.json      end tokens, and how tokens are drawn by default
chat_template.jinja         how messages become a prompt
README.md                   the model card
LICENSE*, NOTICE*           carried into anything that is made from it
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemotron_h.checkpoint.card import CARD, card, parent_name
from nemotron_h.config.generation import GENERATION_FILE, Generation, read_generation, write_generation
from nemotron_h.config.keys import read_object, short
from nemotron_h.config.model import AttentionConfig, ModelConfig
from nemotron_h.errors import CheckpointError, ConfigError
from nemotron_h.text.tokenizer import SETTINGS_FILE, TEMPLATE_FILE, Tokenizer

CARRIED = ("LICENSE*", "LICENCE*", "NOTICE*")
MOST_BYTES = 2**24  # of one such file
MOST_FILES = 100


@dataclass(frozen=True)
class Companions:
    """What stands beside a model. None and empty: the checkpoint has no such thing."""

    generation: Generation = field(default_factory=Generation)
    chat_template: str | None = None
    parent: str | None = None  # the checkpoint that these were read from
    parent_card: str | None = None
    legal: Mapping[str, bytes] = field(default_factory=dict)  # licences and notices, by file name


def read_companions(folder: Path) -> Companions:
    """Of a checkpoint folder. Raises: CheckpointError naming the file."""
    legal = sorted({path for pattern in CARRIED for path in folder.glob(pattern) if path.is_file()})
    if len(legal) > MOST_FILES:
        raise CheckpointError(f"{folder}: must hold at most {MOST_FILES} licences and notices; got {len(legal)}")
    return Companions(
        generation=read_generation(folder),
        chat_template=_read_template(folder),
        parent=parent_name(folder),
        parent_card=_read_text(folder / CARD),
        legal={path.name: _read(path) for path in legal},
    )


def write_companions(
    companions: Companions,
    folder: Path,
    *,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    made_by: str,
    integers: str | None = None,
) -> None:
    """Beside a model of that config; made_by: the command or function that makes it; integers: int8 or int4, where its
    matrices are so."""
    generation = replace(
        companions.generation,
        end_ids=end_ids(companions.generation, config, tokenizer),
        others={"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
        | dict(companions.generation.others),
    )
    write_generation(generation, folder / GENERATION_FILE)
    if companions.chat_template is not None:
        (folder / TEMPLATE_FILE).write_bytes(companions.chat_template.encode())
    for name, content in companions.legal.items():
        (folder / name).write_bytes(content)
    if companions.parent is not None and "/" in companions.parent and companions.parent_card is None:
        warnings.warn(
            f"{companions.parent}: has no {CARD} here, so no licence is carried; "
            f"`nemotron-h pull {companions.parent}` fetches it where there is one",
            stacklevel=4,
        )
    rope = any(isinstance(layer, AttentionConfig) and layer.rope_base is not None for layer in config.layers)
    text = card(
        made_by=made_by,
        parent=companions.parent,
        parent_card=companions.parent_card,
        library=None if rope or integers is not None else "transformers",
        integers=integers,
    )
    (folder / CARD).write_bytes(text.encode())


def end_ids(generation: Generation, config: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Which tokens end a text: generation_config.json says, else config.json, else the tokenizer; else none does.

    Raises: ConfigError where one is beyond the vocabulary.
    """
    own = () if tokenizer is None or tokenizer.eos_id is None else (tokenizer.eos_id,)
    ends = generation.end_ids or config.eos_token_ids or own
    for token in ends:
        if not 0 <= token < config.vocab_size:
            raise ConfigError(
                f"{GENERATION_FILE}: eos_token_id must lie in 0..vocab_size-1 = {config.vocab_size - 1}; got {token}"
            )
    return ends


def _read_template(folder: Path) -> str | None:
    """chat_template.jinja, else what tokenizer_config.json has: one text, or named ones with a default."""
    text = _read_text(folder / TEMPLATE_FILE)
    path = folder / SETTINGS_FILE
    if text is not None or not path.exists():
        return text
    value = read_object(path).get("chat_template")
    if isinstance(value, list):  # the others stay in tokenizer_config.json, which is carried whole
        named = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
        if value and not named:
            warnings.warn(f"{path}: chat_template has none named default; the family's is taken", stacklevel=4)
        value = named[0].get("template") if named else None
    if value is None:
        return None
    if not isinstance(value, str) or not _is_unicode(value):
        raise CheckpointError(f"{path}: chat_template must be a text or a list of named ones; got {short(value)}")
    return value


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _homes(folder: Path) -> list[Path]:
    """The folder itself and, of a snapshot in the Hub's cache, all that the cache has of that model."""
    own = folder.resolve()
    return [own, *(parent for parent in own.parents if parent.name.startswith("models--"))]


def _read_text(path: Path) -> str | None:
    """A text file, None where there is none."""
    if not path.exists():
        return None
    try:
        return _read(path).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: must be UTF-8 text; got other bytes at place {error.start}") from None


def _read(path: Path) -> bytes:
    """A small file, its bytes as they are. A link may lead into the Hub's cache, as every file there does, and nowhere
    else: what is read here is written into folders that are passed on."""
    target = path.resolve()
    if not any(target.is_relative_to(home) for home in _homes(path.parent)):
        raise CheckpointError(f"{path}: must lie in its own folder; got a link to {target}; copy the file there")
    if not path.is_file() or (size := path.stat().st_size) > MOST_BYTES:
        got = f"{size:,}" if path.is_file() else "something else"
        raise CheckpointError(f"{path}: must be a file of at most {MOST_BYTES:,} bytes; got {got}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: must be a readable file; got {error.strerror}") from None
