"""A tokenizer's keys in a GGUF file; what llama.cpp makes of them: tests/peers/test_llama.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.convert.gguf_vocabulary import PATTERNS, no_vocabulary, vocabulary
from nemotron_h.errors import UnsupportedError
from nemotron_h.text.bpe import train
from nemotron_h.text.tokenizer import Tokenizer
from tests.convert.checkpoints import CONTROL, DOCUMENTS, changed, tokenizer_of


def keys(tokenizer: Tokenizer, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"bos": 1, "ends": (2,), "pad": 0, "chat_template": None, **changes}
    return dict(vocabulary(tokenizer, options.pop("vocab_size", 704), **options))


def test_tokens_kinds_and_merges(tmp_path: Path) -> None:
    """By id: control tokens, some of them shown, bytes, merges, and names for what pads the vocabulary."""
    tokenizer = changed(tokenizer_of(), tmp_path, lambda data: data["added_tokens"][3].update(special=False))
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    got = keys(tokenizer)
    tokens, kinds = got["tokenizer.ggml.tokens"], got["tokenizer.ggml.token_type"]
    assert tokens[:4] == CONTROL
    assert kinds[:4] == [3, 3, 3, 4]
    names = {i: name for name, i in data["model"]["vocab"].items()}
    assert tokens[4:700] == [names[i] for i in range(4, 700)]
    assert set(kinds[4:700]) == {1}
    assert tokens[700:] == ["[PAD700]", "[PAD701]", "[PAD702]", "[PAD703]"]
    assert kinds[700:] == [5] * 4
    assert got["tokenizer.ggml.merges"] == [" ".join(pair) for pair in data["model"]["merges"]]
    assert len(got["tokenizer.ggml.merges"]) == 440


def test_a_merge_that_makes_a_control_token_is_left_out(tmp_path: Path) -> None:
    """llama.cpp finds a merged token by its name, and would make a control token of text."""
    tokenizer = tokenizer_of("gpt-2")
    merges = keys(tokenizer)["tokenizer.ggml.merges"]
    name = merges[0].replace(" ", "")

    def add(data: Any) -> None:
        data["added_tokens"].append({**data["added_tokens"][3], "id": data["model"]["vocab"][name], "content": name})

    got = keys(changed(tokenizer, tmp_path, add))["tokenizer.ggml.merges"]
    assert merges[0] not in got
    assert got == [merge for merge in merges if name not in (*merge.split(), merge.replace(" ", ""))]


@pytest.mark.parametrize("name", [*(pieces.name for pieces in PATTERNS.values()), "gpt-2"])
def test_each_pattern_has_its_name(name: str, tmp_path: Path) -> None:
    assert keys(tokenizer_of(name))["tokenizer.ggml.pre"] == name

    def removed(data: Any) -> None:  # the other way to say it
        steps = data["pre_tokenizer"]["pretokenizers"]
        steps[0] |= {"behavior": "Removed", "invert": True} if len(steps) == 2 else {}

    assert keys(changed(tokenizer_of(name), tmp_path, removed))["tokenizer.ggml.pre"] == name


def test_the_begin_of_text_token(tmp_path: Path) -> None:
    """As tokenizer_config.json says, else before texts as we do, and not before what a template writes."""
    said = "tokenizer.ggml.add_bos_token"
    assert keys(tokenizer_of())[said] is True
    assert keys(tokenizer_of(), chat_template="x")[said] is False
    assert keys(tokenizer_of(add_bos_token=False))[said] is False
    assert keys(tokenizer_of(add_bos_token=True), chat_template="x")[said] is True


def test_ends_and_padding() -> None:
    got = keys(tokenizer_of(), ends=(2, 3, 2, 0), pad=None)
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    assert [got[f"tokenizer.ggml.{name}"] for name in names] == [2, 3, 0]
    assert "tokenizer.ggml.padding_token_id" not in got


def test_without_a_tokenizer() -> None:
    assert no_vocabulary() == {"tokenizer.ggml.model": "none"}


def cut_otherwise(data: Any) -> None:
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\d+|\D+"}


def cut_twice(data: Any) -> None:
    data["pre_tokenizer"]["pretokenizers"].insert(0, data["pre_tokenizer"]["pretokenizers"][0])


def joined(data: Any) -> None:
    data["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "MergedWithNext"


def prefixed(data: Any) -> None:
    data["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def normalised(data: Any) -> None:
    data["normalizer"] = {"type": "NFC"}


def unmerged(data: Any) -> None:
    data["model"] |= {"merges": [], "ignore_merges": True}


def a_whole_word(data: Any) -> None:
    data["model"]["vocab"]["textwrapping"] = 700


def a_word_for_a_control_token(data: Any) -> None:
    data["added_tokens"].append({**data["added_tokens"][3], "id": 700, "content": "word"})


def spelt_in_no_bytes(data: Any) -> None:
    data["model"]["vocab"]["世"] = 700


def named_as_padding(data: Any) -> None:
    data["added_tokens"].append({**data["added_tokens"][3], "id": 700, "content": "[PAD702]"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut_otherwise, r"pre_tokenizer must cut text as .* \(tekken, llama-bpe, qwen2, gpt-2\); got .*\\\\d"),
        (cut_twice, "pre_tokenizer must cut text as"),
        (joined, "pre_tokenizer must cut text as"),
        (prefixed, "pre_tokenizer must cut text as"),
        (normalised, "normalizer must be null for llama.cpp, which changes no text; got .*NFC"),
        (unmerged, "model.merges must hold one for a GGUF file; got none"),
        (a_whole_word, "textwrapping must be what its merges make, as llama.cpp's tekken takes it whole"),
        (a_word_for_a_control_token, "word must be no word, as a control token: llama.cpp's tekken takes it from text"),
        (spelt_in_no_bytes, "'世' must be spelt in letters that stand for bytes, for llama.cpp"),
        (named_as_padding, r"\[PAD702\] must be no token's name, as padding has it"),
    ],
)
def test_what_llama_cpp_reads_otherwise_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"^tokenizer.json: {words}.*; convert it without .*: --no-tokenizer$"):
        keys(changed(tokenizer_of(), tmp_path, change))


def test_a_word_taken_whole_where_llama_cpp_merges(tmp_path: Path) -> None:
    def whole(data: Any) -> None:
        data["model"]["ignore_merges"] = True
        data["model"]["vocab"]["textwrapping"] = 700

    with pytest.raises(UnsupportedError, match=r"textwrapping must be what .* gpt-2 does not take it whole"):
        keys(changed(tokenizer_of("gpt-2"), tmp_path, whole))


@pytest.mark.parametrize("ends", [(), (0, 1, 2, 3)])
def test_no_end_or_too_many(ends: tuple[int, ...]) -> None:
    """Without one, llama.cpp would end at token 11."""
    with pytest.raises(UnsupportedError, match=f"^eos_token_id: must be 1 to 3 tokens .*; got {len(ends)}; "):
        keys(tokenizer_of(), ends=ends)


def test_a_tokenizer_that_is_trained_here_cuts_otherwise() -> None:
    """Its pieces hold the blanks that begin a line, which no name of llama.cpp's means."""
    with pytest.raises(UnsupportedError, match="pre_tokenizer must cut text as"):
        keys(train(DOCUMENTS, TokenizerConfig(vocab_size=320)))
