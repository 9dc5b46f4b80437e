import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.errors import ConfigError, DataError
from nemotron_h.text.bpe import PIECES, sample, train
from nemotron_h.text.tokenizer import TOKENIZER_FILE, Tokenizer


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("HTTPServer parseHeader", ["HTTPServer", " parse", "Header"]),
        ("x = 2048.5", ["x", " =", " ", "2", "0", "4", "8", ".", "5"]),
        ("def f():\n        return 1", ["def", " f", "():\n       ", " return", " ", "1"]),
        ("a\n\n    b", ["a", "\n\n   ", " b"]),
        ("a\r\n\tb  ", ["a", "\r\n", "\tb", "  "]),
        ("self._name", ["self", "._", "name"]),
        ("naïve e\u0301t, 你好", ["naïve", " e\u0301t", ",", " 你好"]),
        ("# ---\n", ["#", " ---\n"]),
        ("</s>", ["</", "s", ">"]),
    ],
)
def test_pieces(text: str, pieces: list[str]) -> None:
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == pieces


def test_no_token_holds_a_digit_beside_anything(tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.token_bytes(i) for i in range(16, 700)]
    assert sorted(token for token in tokens if set(token) & set(b"0123456789")) == [
        b"%d" % digit for digit in range(10)
    ]


def test_ids_begin_with_control_tokens_then_bytes(tokenizer: Tokenizer) -> None:
    names = [tokenizer.token_bytes(i) for i in range(16)]
    assert names == [b"<unk>", b"<s>", b"</s>", *(b"<SPECIAL_%d>" % i for i in range(3, 16))]
    assert {tokenizer.token_bytes(i) for i in range(16, 272)} == {bytes([byte]) for byte in range(256)}
    assert tokenizer.vocab_size == 700


def test_same_documents_give_the_same_file(tokenizer: Tokenizer, documents: list[str], tmp_path: Path) -> None:
    """In another order, and in another process, where hashes of strings are seeded otherwise."""
    shuffled = random.Random(1).sample(documents, len(documents))
    train(shuffled, TokenizerConfig(vocab_size=700)).save(tmp_path / "here")
    for name, document in enumerate(documents):
        (tmp_path / f"{name}.txt").write_bytes(document.encode())
    program = """
import sys; from pathlib import Path
from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.text.bpe import train
folder = Path(sys.argv[1])
documents = [file.read_bytes().decode() for file in folder.glob("*.txt")]
train(documents, TokenizerConfig(vocab_size=700)).save(folder / "there")
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    tokenizer.save(tmp_path / "first")
    contents = {(tmp_path / name / TOKENIZER_FILE).read_bytes() for name in ("first", "here", "there")}
    assert len(contents) == 1


def test_code_costs_few_tokens() -> None:
    text = "".join(
        f"class C{i}:\n    def method(self):\n        if self.value:\n            return None\n\n" for i in range(99)
    )
    tokenizer = train([text], TokenizerConfig(vocab_size=318))
    # one token each: "if", " self", ".value", ":\n" with the indent after it, " return", " None"
    assert len(tokenizer.encode("if self.value:\n            return None")) == 6


@given(documents=st.lists(st.text(max_size=9), max_size=12), limit=st.integers(1, 60), seed=st.integers(0, 99))
def test_sample_is_the_beginning_of_the_order_by_hash(documents: list[str], limit: int, seed: int) -> None:
    contents = [document.encode() for document in documents]
    contents.sort(key=lambda content: hashlib.blake2b(content, digest_size=16).digest())
    wanted, total = [], 0
    for content in contents:
        if total >= limit:
            break
        wanted.append(content.decode())
        total += len(content)
    got = list(sample(random.Random(seed).sample(documents, len(documents)), limit))
    assert [text for text in got if text] == [text for text in wanted if text]


def test_too_little_text_is_refused_with_the_size_it_allows() -> None:
    with pytest.raises(DataError, match="must be at most what the documents teach, 275; got 4096; give more text"):
        train(["abcd"], TokenizerConfig())
    assert train(["abcd"], TokenizerConfig(vocab_size=275)).encode("abcd") == [274]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 271}, r"vocab_size: must hold the control tokens and 256 bytes, 272 in all; got 271"),
        ({"reserved_tokens": -1}, r"reserved_tokens: must not be negative; got -1"),
        ({"sample_bytes": 0}, r"sample_bytes: must be positive; got 0"),
    ],
)
def test_settings_that_break_a_rule_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenizerConfig(**values)


def test_the_family_reserves_a_thousand_ids(documents: list[str]) -> None:
    tokenizer = train(documents, TokenizerConfig(vocab_size=1300, reserved_tokens=997))
    assert tokenizer.token_id("<SPECIAL_999>") == 999
    assert min(tokenizer.encode("any text at all")) >= 1000
