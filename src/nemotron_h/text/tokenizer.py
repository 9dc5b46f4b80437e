"""Text to ids and back: a byte-level BPE, read from `tokenizer.json`.

    text -> pieces (a regular expression) -> bytes -> merges, best first -> ids
    ids -> bytes -> text, where bytes that are no UTF-8 read as U+FFFD

Ids are of two kinds: those of bytes, which text becomes, and control tokens (`</s>`, `<SPECIAL_10>`), which it never
does: a text that spells one is encoded letter by letter. Control tokens are put among ids by name, with `token_id`.
Format: the `tokenizers` library's, so that the file also loads in transformers, vLLM and llama.cpp's converter.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self, TypeGuard

import tokenizers

from nemotron_h.config.keys import short, shown
from nemotron_h.config.tokenizer import CONTROL_NAMES
from nemotron_h.errors import CheckpointError, DataError, UnsupportedError
from nemotron_h.files import replacing

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
AT_ONCE = 256  # texts in one call of the library, whose results take many times the memory of their ids
MAX_ID = 2**31 - 1  # shards and models keep ids in int32
UNK, BOS, EOS = CONTROL_NAMES


class Tokenizer:
    """Encodes text, which never becomes a control token, and decodes ids."""

    def __init__(self, source: bytes, settings: bytes | None = None, *, where: Path = Path(TOKENIZER_FILE)) -> None:
        """source and settings: the content of tokenizer.json and tokenizer_config.json; where: named in errors."""
        self._source = source
        self._settings = settings
        self._where = where
        data = _parse_object(source, where)
        _check_kind(data, where)
        self._ids, self._control, self._special = _read_names(data, where)
        self._engine = _build_engine(data, self._control, self._ids, where)
        self._bytes = {i: name.encode() if i in self._control else _spelt(name) for name, i in self._ids.items()}
        self.settings = _parse_object(settings, where.with_name(SETTINGS_FILE)) if settings is not None else {}
        self.known_ids = tuple(sorted(self._bytes))  # those with a meaning; a file may leave holes between them
        self.vocab_size = self.known_ids[-1] + 1  # one more than the largest id
        self.control_options = {entry["content"]: entry for entry in _added_tokens(data)}  # lstrip, normalized...
        self.normalizes = data.get("normalizer") is not None  # text is changed before it is encoded
        self.unk_id = self._named_id("unk_token", UNK)
        self.bos_id = self._named_id("bos_token", BOS)
        self.eos_id = self._named_id("eos_token", EOS)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read tokenizer.json from a folder, or the file itself, with the tokenizer_config.json beside it.

        Raises: CheckpointError where a file is missing or damaged; UnsupportedError where it is no byte-level BPE.
        """
        file = Path(path)
        if file.is_dir():
            file = file / TOKENIZER_FILE
        beside = file.with_name(SETTINGS_FILE)
        return cls(_read(file), _read(beside) if beside.exists() else None, where=file)

    def save(self, folder: str | Path) -> None:
        """Write both files into folder; what was loaded is written back byte for byte.

        Without settings, those of an older tokenizer there are removed. Raises: OSError naming the file that the disk
        does not take.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._settings is None:
            (folder / SETTINGS_FILE).unlink(missing_ok=True)
        else:
            _write(folder / SETTINGS_FILE, self._settings)
        _write(folder / TOKENIZER_FILE, self._source)

    @property
    def digest(self) -> str:
        """Of both files: tokenizers with one digest encode alike."""
        return hashlib.sha256(self._source + b"\0" + (self._settings or b"")).hexdigest()[:16]

    @property
    def plain(self) -> dict[str, Any]:
        """tokenizer.json less its control tokens: what text is encoded with, for who writes it in another format."""
        data: dict[str, Any] = json.loads(self._engine.to_str())
        return data

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens that `decode` leaves out unless asked to show them."""
        return self._special

    def encode(self, text: str) -> list[int]:
        """Ids of text alone: nothing is put before or after it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, on all cores (TOKENIZERS_PARALLELISM=false: on one)."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), AT_ONCE):
            some = list(texts[start : start + AT_ONCE])
            try:
                encodings = self._engine.encode_batch_fast(some, add_special_tokens=False)
            except TypeError:
                for text in some:
                    utf8(text)
                raise
            ids.extend(encoding.ids for encoding in encodings)
        return ids

    def decode(self, ids: Iterable[int], *, special_visible: bool = False) -> str:
        """Text of ids; special_visible: control tokens appear by name instead of being left out."""
        parts = (self.token_bytes(i) for i in ids if special_visible or i not in self._special)
        return b"".join(parts).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for; of a control token, its name."""
        try:
            return self._bytes[token_id]
        except KeyError:
            rule = f"must be one that {self._where.name} gives a meaning, under {self.vocab_size}"
            raise DataError(f"token id: {rule}; got {token_id}") from None

    def token_id(self, name: str) -> int:
        """The id of a control token, by its name."""
        token = self._ids.get(name)
        if token is None or token not in self._control:
            raise CheckpointError(f"{self._where}: has no control token {name!r}; is this the model's own tokenizer?")
        return token

    def _named_id(self, key: str, default: str) -> int | None:
        """The id tokenizer_config.json gives a role; where it is silent, the family's name for it, if there is one."""
        if key not in self.settings:
            return self._ids.get(default)
        name = self.settings[key]
        if isinstance(name, dict):
            name = name.get("content")
        if name is None:
            return None
        if not isinstance(name, str) or name not in self._ids:
            where = self._where.with_name(SETTINGS_FILE)
            raise CheckpointError(f"{where}: {key} must name a token of {self._where.name}; got {short(name)}")
        return self._ids[name]


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer whose ids go beyond a model's vocabulary; a smaller one is fine (vocabularies are padded)."""
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{TOKENIZER_FILE}: has {tokenizer.vocab_size} ids; the model's vocabulary is {vocab_size}; "
            "take the tokenizer the model was trained with"
        )


def _byte_alphabet() -> dict[str, int]:
    """The letter that stands for each byte in a vocabulary: itself where printable, else one from U+0100 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_alphabet()


def _spelt(name: str) -> bytes:
    """The bytes a vocabulary entry spells; an entry outside the alphabet stands for its own UTF-8."""
    try:
        return bytes(map(BYTE_OF_LETTER.__getitem__, name))
    except KeyError:
        return name.encode()


def _parse_object(source: bytes, where: Path) -> dict[str, Any]:
    try:
        data = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: must be JSON; got {error}; was the copy cut short?") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: must be a JSON object; got {type(data).__name__}")
    return data


def _check_kind(data: dict[str, Any], where: Path) -> None:
    """Refuse what is not a deterministic byte-level BPE: bytes are what decoding and streaming count on."""

    def kind(key: str) -> object:
        part = data.get(key)
        steps = part.get("pretokenizers") if isinstance(part, dict) and part.get("type") == "Sequence" else None
        last = steps[-1] if isinstance(steps, list) and steps else part
        return last.get("type") if isinstance(last, dict) else last

    for key, wanted in (("model", "BPE"), ("pre_tokenizer", "ByteLevel"), ("decoder", "ByteLevel")):
        found = kind(key)
        if not isinstance(found, str):
            raise CheckpointError(f"{where}: {key} must be an object with a type; got {short(found)}")
        if found != wanted:
            raise UnsupportedError(f"{where}: {key} must be {wanted}, as in the family; got {short(found)}")
    # a prefix or suffix marks pieces of words, which bytes do not know; the library aborts the process on some
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if data["model"].get(option):
            raise UnsupportedError(f"{where}: model.{option} must be off; got {short(data['model'][option])}")


def _read_names(data: dict[str, Any], where: Path) -> tuple[dict[str, int], frozenset[int], frozenset[int]]:
    """Ids by name; the control tokens among them; and of those the ones that decoding leaves out."""
    vocabulary = data["model"].get("vocab")
    if not isinstance(vocabulary, dict) or not all(_is_id(i) for i in vocabulary.values()):
        raise CheckpointError(f"{where}: model.vocab must map each token to an id of 0 or more; it does not")
    missing = [byte for letter, byte in BYTE_OF_LETTER.items() if letter not in vocabulary]
    if missing:
        rule = "must hold every byte, or some text has no ids"
        raise UnsupportedError(f"{where}: model.vocab {rule}; got none for byte {missing[0]}")
    ids = dict(vocabulary)
    control: set[int] = set()
    special: set[int] = set()
    for entry in _added_tokens(data):
        name, token = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not _is_name(name) or not _is_id(token) or ids.setdefault(name, token) != token:
            raise CheckpointError(f"{where}: added_tokens must have a content and its one id each; got {short(entry)}")
        control.add(token)
        if entry.get("special"):
            special.add(token)
    distinct = len(set(ids.values()))
    if distinct != len(ids):
        raise CheckpointError(f"{where}: every token must have an id of its own; got {len(ids)} tokens, {distinct} ids")
    return ids, frozenset(control), frozenset(special)


def _added_tokens(data: dict[str, Any]) -> list[Any]:
    added = data.get("added_tokens", [])
    return added if isinstance(added, list) else [added]


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MAX_ID


def _is_name(value: object) -> TypeGuard[str]:
    """Whether a control token may be called so: as a byte's letter it would take that byte away from text."""
    if not isinstance(value, str) or not value or value in BYTE_OF_LETTER:
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _build_engine(
    data: dict[str, Any], control: frozenset[int], ids: dict[str, int], where: Path
) -> tokenizers.Tokenizer:
    """The library's encoder over a vocabulary without control tokens: no text reaches one, whatever its flags."""
    hidden = {name for name, i in ids.items() if i in control}
    model = dict(data["model"])
    model["vocab"] = {name: i for name, i in model["vocab"].items() if name not in hidden}
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{where}: model.merges must be a list; got {type(merges).__name__}")
    model["merges"] = [merge for merge in merges if not _touches(merge, hidden)]
    model["unk_token"] = None
    plain = {**data, "model": model, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises nothing narrower
        reason = shown(" ".join(str(error).split()))
        raise CheckpointError(f"{where}: must be what the tokenizers library reads; got {reason}") from None


def _touches(merge: object, hidden: set[str]) -> bool:
    """Whether a merge, ["a", "b"] or "a b", takes or gives a hidden token."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return False
    return not hidden.isdisjoint([*parts, "".join(parts)])


def utf8(text: str) -> bytes:
    """The bytes of text, which lone surrogates have none of."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise DataError(f"text: must be Unicode without lone surrogates; got {found}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; copy the model's tokenizer there, or train one") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)
