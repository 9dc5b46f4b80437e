"""A tokenizer as keys of a GGUF file: tokens by id, the merges, and llama.cpp's name for how text is cut into pieces.

llama.cpp knows patterns by name alone, so a tokenizer whose pattern is none of them is refused: it would give other
tokens. Ids without a meaning, which pad a vocabulary, get names of their own.
Format: llama.cpp's `src/llama-vocab.cpp`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from nemotron_h.config.gguf import GgufValue
from nemotron_h.config.keys import short, shown
from nemotron_h.errors import UnsupportedError
from nemotron_h.text.tokenizer import BYTE_OF_LETTER, TOKENIZER_FILE, Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens; user-defined ones are shown in text
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # llama.cpp ends a text at any of them
WITHOUT = "convert it without its tokenizer: --no-tokenizer"

UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LEAD, REST = r"[^\r\n\p{L}\p{N}]?", r"\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


@dataclass(frozen=True)
class Pieces:
    """How llama.cpp, by one of its names, cuts text."""

    name: str
    whole_words: bool  # a piece that is a token is that token, whatever the merges say


FAMILY = Pieces("tekken", whole_words=True)
PATTERNS = {
    rf"{LEAD}{UPPER}*{LOWER}+|{LEAD}{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}": FAMILY,
    rf"{ENDINGS}|{LEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}": Pieces("llama-bpe", True),
    rf"{ENDINGS}|{LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}": Pieces("qwen2", False),
}
BYTE_LEVEL = Pieces("gpt-2", whole_words=False)  # the tokenizers library's own pattern


def no_vocabulary() -> Mapping[str, GgufValue]:
    """The keys of a file that takes and gives token ids alone."""
    return {"tokenizer.ggml.model": "none"}


def vocabulary(
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    bos: int,
    ends: Sequence[int],
    pad: int | None,
    chat_template: str | None,
) -> Mapping[str, GgufValue]:
    """The keys of a tokenizer, for a model of vocab_size ids.

    Raises: UnsupportedError naming what llama.cpp would read otherwise.
    """
    plain = tokenizer.plain
    pieces = pieces_of(plain)
    check_whole_words(plain, pieces, [name for name, i in control_ids(tokenizer).items() if i in tokenizer.special_ids])
    names, kinds = named_tokens(tokenizer, plain["model"]["vocab"], vocab_size)
    if not 1 <= len(set(ends)) <= len(END_KEYS):
        raise UnsupportedError(
            f"eos_token_id: must be 1 to {len(END_KEYS)} tokens for llama.cpp; got {len(set(ends))}; {WITHOUT}"
        )
    values: dict[str, GgufValue] = {
        "model": "gpt2",
        "pre": pieces.name,
        "tokens": names,
        "token_type": kinds,
        "merges": merges_of(plain),
        "bos_token_id": bos,
        **dict(zip(END_KEYS, dict.fromkeys(ends), strict=False)),
        "add_bos_token": begins(tokenizer, chat_template),
        "add_eos_token": False,
    }
    if tokenizer.unk_id is not None:
        values["unknown_token_id"] = tokenizer.unk_id
    if pad is not None:
        values["padding_token_id"] = pad
    keys: dict[str, GgufValue] = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return keys if chat_template is None else keys | {"tokenizer.chat_template": chat_template}


def pieces_of(plain: Mapping[str, Any]) -> Pieces:
    """llama.cpp's name for the pattern of a tokenizer.json."""
    if plain.get("normalizer") is not None:
        raise UnsupportedError(
            f"{TOKENIZER_FILE}: normalizer must be null for llama.cpp, which changes no text; "
            f"got {short(plain['normalizer'])}; {WITHOUT}"
        )
    step = plain["pre_tokenizer"]
    *cuts, last = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    found = None if last["add_prefix_space"] else pieces_cut(cuts, also_byte_level=last["use_regex"])
    if found is None:
        known = ", ".join(pieces.name for pieces in (*PATTERNS.values(), BYTE_LEVEL))
        patterns = [cut.get("pattern") for cut in cuts]
        raise UnsupportedError(
            f"{TOKENIZER_FILE}: pre_tokenizer must cut text as one of llama.cpp's does that are known here ({known}); "
            f"got {short(patterns or step)}; {WITHOUT}"
        )
    return found


def pieces_cut(cuts: Sequence[Mapping[str, Any]], *, also_byte_level: bool) -> Pieces | None:
    """also_byte_level: whether the library's own pattern comes after the cuts."""
    if not cuts or also_byte_level:
        return BYTE_LEVEL if also_byte_level and not cuts else None
    [cut, *more] = cuts
    # two ways to say the same, as these patterns leave nothing between two pieces
    if (
        more
        or cut["type"] != "Split"
        or (cut["behavior"], cut["invert"]) not in (("Isolated", False), ("Removed", True))
    ):
        return None
    return PATTERNS.get(cut["pattern"].get("Regex", ""))


def check_whole_words(plain: Mapping[str, Any], pieces: Pieces, special: Sequence[str]) -> None:
    """Refuse a tokenizer where it matters whether a piece that is a token's name is taken whole, and llama.cpp differs.

    special: names of control tokens, which text never becomes here.
    """
    model = plain["model"]
    words = {text: i for name, i in model["vocab"].items() if (text := text_of(name)) is not None}
    merging = tokenizers.Tokenizer.from_str(json.dumps({**plain, "model": {**model, "ignore_merges": False}}))
    if pieces.whole_words and (taken := next(iter(whole(special, merging)), None)):
        raise UnsupportedError(
            f"{TOKENIZER_FILE}: {shown(taken)} must be no word, as a control token: llama.cpp's {pieces.name} takes it "
            f"from text; {WITHOUT}"
        )
    if model["ignore_merges"] == pieces.whole_words:
        return
    found = whole(list(words), merging)
    for text, encoding in zip(found, merging.encode_batch_fast(found, add_special_tokens=False), strict=True):
        if encoding.ids != [words[text]]:
            raise UnsupportedError(
                f"{TOKENIZER_FILE}: {shown(text)} must be what its merges make, as llama.cpp's {pieces.name} "
                f"{'takes it whole' if pieces.whole_words else 'does not take it whole'}; {WITHOUT}"
            )


def whole(texts: Sequence[str], engine: tokenizers.Tokenizer) -> list[str]:
    """The texts that are one piece."""
    cut = engine.pre_tokenizer
    return [text for text in texts if cut is not None and len(cut.pre_tokenize_str(text)) == 1]


def named_tokens(tokenizer: Tokenizer, vocabulary: Mapping[str, int], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every id's name, each once, and its kind."""
    control = control_ids(tokenizer)
    names = {i: name for name, i in (*vocabulary.items(), *control.items())}
    strange = next((name for name in vocabulary if not name or not set(name) <= BYTE_OF_LETTER.keys()), None)
    if strange is not None:
        raise UnsupportedError(
            f"{TOKENIZER_FILE}: {shown(strange)!r} must be spelt in letters that stand for bytes, for llama.cpp; "
            f"{WITHOUT}"
        )
    padding = {i: f"[PAD{i}]" for i in range(vocab_size) if i not in names}
    if taken := set(padding.values()) & set(names.values()):
        raise UnsupportedError(
            f"{TOKENIZER_FILE}: {shown(min(taken))} must be no token's name, as padding has it; {WITHOUT}"
        )
    kinds = dict.fromkeys(padding, UNUSED) | dict.fromkeys(vocabulary.values(), NORMAL)
    kinds |= {i: CONTROL if i in tokenizer.special_ids else USER_DEFINED for i in control.values()}
    every = names | padding
    return [every[i] for i in range(vocab_size)], [kinds[i] for i in range(vocab_size)]


def merges_of(plain: Mapping[str, Any]) -> list[str]:
    """Pairs, best first, as llama.cpp reads them: two tokens and a space between."""
    merges = [" ".join(pair) for pair in plain["model"]["merges"]]
    if not merges:
        raise UnsupportedError(f"{TOKENIZER_FILE}: model.merges must hold one for a GGUF file; got none; {WITHOUT}")
    return merges


def control_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Control tokens by name, whether or not they are shown."""
    return {name: tokenizer.token_id(name) for name in tokenizer.control_options}


def begins(tokenizer: Tokenizer, chat_template: str | None) -> bool:
    """Whether llama.cpp puts the begin-of-text token before a prompt: as tokenizer_config.json says; else before texts,
    which we begin so too, and not before what a chat template writes, which says all."""
    said = tokenizer.settings.get("add_bos_token")
    return said if isinstance(said, bool) else chat_template is None


def text_of(name: str) -> str | None:
    """The text that a vocabulary entry spells, None where its bytes are no text."""
    try:
        return bytes(BYTE_OF_LETTER[letter] for letter in name).decode()
    except (KeyError, UnicodeDecodeError):
        return None
