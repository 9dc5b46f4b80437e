import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.errors import CheckpointError, DataError, NemotronError, UnsupportedError
from nemotron_h.text.bpe import train
from nemotron_h.text.tokenizer import AT_ONCE, SETTINGS_FILE, TOKENIZER_FILE, Tokenizer, check_fits
from tests.full_disk import full_disk

TRICKY = [
    "</s>",
    "<SPECIAL_10>",
    "<s>a</s>",
    " <unk>",
    "\r\n",
    "\x00",
    "  leading",
    "9" * 40,
    "e\u0301🙂",
    "<SPECIAL_",
    "",
]


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Any) -> Tokenizer:
    """Load folder's tokenizer.json after change(its content)."""
    file = folder / TOKENIZER_FILE
    data = json.loads(file.read_bytes())
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")
    return Tokenizer.load(folder)


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.lists(st.sampled_from(TRICKY)).map("".join))
def test_text_comes_back_and_never_becomes_control(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, special_visible=True) == text
    assert tokenizer.special_ids.isdisjoint(ids)


def test_control_tokens_are_encoded_by_other_readers_of_the_file(folder: Path) -> None:
    # The library by itself turns "</s>" into id 2; ours must not, so the guard has something to guard against.
    assert tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE)).encode("</s>").ids == [2]
    assert 2 not in Tokenizer.load(folder).encode("</s>")


def test_merges_that_spell_a_control_token_are_not_taken(folder: Path) -> None:
    def spell(data: dict[str, Any]) -> None:
        # one piece per text, and merges that lead from letters to "</s>" itself
        data["pre_tokenizer"] = data["pre_tokenizer"]["pretokenizers"][-1]
        for name in ("</", "s>"):
            data["model"]["vocab"].setdefault(name, len(data["model"]["vocab"]))
        data["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"]]
        data["model"]["ignore_merges"] = True

    guarded = rewrite(folder, spell)
    unguarded = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    unguarded.encode_special_tokens = True
    assert unguarded.encode("</s>").ids == [2]
    assert 2 not in guarded.encode("</s>")
    assert guarded.decode(guarded.encode("</s>")) == "</s>"


def test_plain_tokens_that_are_added_are_control_too(folder: Path) -> None:
    def add(data: dict[str, Any]) -> None:
        entry = {**data["added_tokens"][0], "id": len(data["model"]["vocab"]), "content": "<think>", "special": False}
        data["added_tokens"].append(entry)

    tokenizer = rewrite(folder, add)
    think = tokenizer.token_id("<think>")
    assert think not in tokenizer.encode("<think>")
    assert tokenizer.decode([think, 1]) == "<think>"  # not special: shown


def test_encode_equals_the_library_on_plain_text(tokenizer: Tokenizer, documents: list[str], folder: Path) -> None:
    reference = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    wanted = [reference.encode(document, add_special_tokens=False).ids for document in documents]
    assert tokenizer.encode_batch(documents) == wanted
    assert [tokenizer.encode(document) for document in documents] == wanted


@pytest.mark.parametrize("count", [0, 1, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 2 * AT_ONCE + 7])
def test_many_texts_are_each_encoded_alone(tokenizer: Tokenizer, count: int) -> None:
    texts = [f"def number_{index}(): return {index}" for index in range(count)]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), visible=st.booleans())
def test_decode_equals_the_library_for_any_ids(tokenizer: Tokenizer, seed: int, visible: bool) -> None:
    draw = random.Random(seed)
    first = 16 + 256 if draw.random() < 0.5 else tokenizer.vocab_size  # half of the time broken UTF-8 for the most part
    ids = [draw.randrange(first) for _ in range(draw.randrange(30))]
    reference = tokenizers.Tokenizer.from_str(tokenizer._source.decode())
    assert tokenizer.decode(ids, special_visible=visible) == reference.decode(ids, skip_special_tokens=not visible)


def test_save_then_load_then_save_keeps_the_bytes(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    Tokenizer.load(folder).save(again)
    for name in (TOKENIZER_FILE, SETTINGS_FILE):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in again.iterdir()) == [TOKENIZER_FILE, SETTINGS_FILE]


def test_settings_of_another_tokenizer_do_not_stay(folder: Path) -> None:
    """Saved without settings of its own, a tokenizer reads back as itself."""
    (folder / SETTINGS_FILE).write_text('{"eos_token": "<SPECIAL_12>"}', encoding="utf-8")
    plain = Tokenizer((folder / TOKENIZER_FILE).read_bytes())
    plain.save(folder)
    assert Tokenizer.load(folder).eos_id == plain.eos_id == 2
    assert [path.name for path in folder.iterdir()] == [TOKENIZER_FILE]


def test_a_full_disk_names_the_file_and_leaves_the_old_one(folder: Path, documents: list[str]) -> None:
    before = (folder / TOKENIZER_FILE).read_bytes()
    other = train(documents, TokenizerConfig(vocab_size=650))
    with pytest.raises(OSError, match="File too large") as caught, full_disk(3000):
        other.save(folder)
    assert caught.value.filename == str(folder / TOKENIZER_FILE)
    assert (folder / TOKENIZER_FILE).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == [TOKENIZER_FILE, SETTINGS_FILE]


def test_known_ids_leave_out_the_holes(folder: Path) -> None:
    def add(data: dict[str, Any]) -> None:
        data["added_tokens"].append({**data["added_tokens"][0], "id": 718, "content": "<SPECIAL_718>"})

    tokenizer = rewrite(folder, add)
    assert tokenizer.vocab_size == 719
    assert tokenizer.known_ids == (*range(700), 718)


def test_names_of_the_family(tokenizer: Tokenizer) -> None:
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.token_id("<SPECIAL_10>") == 10
    assert tokenizer.decode([10, 2], special_visible=True) == "<SPECIAL_10></s>"
    assert tokenizer.decode([10, 2]) == ""
    with pytest.raises(CheckpointError, match="no control token 'def'"):
        tokenizer.token_id("def")


@pytest.mark.parametrize(
    ("named", "wanted"),
    [("<SPECIAL_12>", 12), ({"content": "<SPECIAL_12>", "special": True}, 12), (None, None)],
)
def test_eos_is_what_the_settings_file_says(folder: Path, named: object, wanted: int | None) -> None:
    (folder / SETTINGS_FILE).write_text(json.dumps({"eos_token": named}), encoding="utf-8")
    assert Tokenizer.load(folder / TOKENIZER_FILE).eos_id == wanted


def test_eos_that_is_no_token_is_refused(folder: Path) -> None:
    (folder / SETTINGS_FILE).write_text('{"eos_token": "<gone>"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: eos_token must name .* got '<gone>'"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("token", [700, -1, "a"])
def test_ids_without_a_token_are_refused(tokenizer: Tokenizer, token: Any) -> None:
    with pytest.raises(DataError, match=f"under 700; got {token}"):
        tokenizer.decode([20, token])


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"got U\+D800 at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(DataError, match=r"got U\+DC00 at character 0"):
        train(["fine", "\udc00"], TokenizerConfig(vocab_size=300))


def test_check_fits(tokenizer: Tokenizer) -> None:
    check_fits(tokenizer, 700)
    check_fits(tokenizer, 704)
    with pytest.raises(CheckpointError, match=r"^tokenizer\.json: has 700 ids; the model's vocabulary is 699; "):
        check_fits(tokenizer, 699)


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing; "):
        Tokenizer.load(tmp_path)


WRONG = [None, 7, -1, "x", True, [], {}, [[]], 2**40, "\ud800", [None], {"type": 3}]


def test_damaged_files_give_one_line_that_names_the_file(tokenizer: Tokenizer, folder: Path) -> None:
    """Any cut of the file is refused; any field put wrong is refused, or means nothing to us."""
    file, draw = folder / TOKENIZER_FILE, random.Random(0)
    content = file.read_bytes()
    end = len(content.rstrip())
    for cut in [0, 1, *(draw.randrange(end) for _ in range(30)), end - 1]:
        file.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=r"^[^\n]*tokenizer\.json: must be JSON; [^\n]*$"):
            Tokenizer.load(folder)
    refused = 0
    deep = [("model", "vocab", "a"), ("model", "merges", 5), ("added_tokens", 1, "id")]
    for path in [*paths(json.loads(content)), *deep]:
        for wrong in WRONG:
            data = json.loads(content)
            put(data, path, wrong)
            file.write_text(json.dumps(data), encoding="utf-8")
            try:
                Tokenizer.load(folder).encode("any text </s>\n")
            except NemotronError as error:
                assert str(file) in str(error) and "\n" not in str(error), error
                refused += 1
    assert refused > 100


def paths(data: Any, depth: int = 2) -> list[tuple[Any, ...]]:
    """Ways to every field down to depth, of lists the first element."""
    below = data.items() if isinstance(data, dict) else list(enumerate(data))[:1] if isinstance(data, list) else []
    small = list(below)[:12]
    return [(key, *rest) for key, value in small for rest in [(), *(paths(value, depth - 1) if depth else [])]]


def put(data: Any, path: tuple[Any, ...], value: object) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe\x00", b"[]", b"3", b"{}"])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / TOKENIZER_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: (must be|model must be)"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["model"].update(type="Unigram"), "model must be BPE, as in the family; got 'Unigram'"),
        (lambda data: data.update(decoder={"type": "Metaspace"}), "decoder must be ByteLevel"),
        (lambda data: data["model"].update(dropout=0.1), r"model\.dropout must be off; got 0\.1"),
        (
            lambda data: data["model"].update(continuing_subword_prefix="x"),
            "continuing_subword_prefix must be off; got 'x'",
        ),
        (lambda data: data["model"]["vocab"].pop("Ā"), "must hold every byte.*got none for byte 0"),
    ],
)
def test_other_kinds_are_refused_by_name(folder: Path, change: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        rewrite(folder, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["added_tokens"][1].update(content="zz"), "an id of its own; got 701 tokens, 700 ids"),
        (lambda data: data["added_tokens"][1].update(content="a", id=data["model"]["vocab"]["a"]), "added_tokens must"),
        (lambda data: data["added_tokens"][1].update(id=9), "added_tokens must have"),
        (
            lambda data: data["model"]["vocab"].update(zz=50),
            "an id of its own; got 701 tokens, 700 ids",
        ),
    ],
)
def test_ids_that_mean_two_things_are_refused(folder: Path, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        rewrite(folder, change)


@pytest.mark.parity
def test_transformers_loads_what_we_save(folder: Path, documents: list[str]) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer
    peer, ours = auto.from_pretrained(folder), Tokenizer.load(folder)
    for document in documents:
        ids = ours.encode(document)
        assert peer.encode(document, add_special_tokens=False) == ids
        assert peer.decode(ids) == document
    assert (peer.unk_token_id, peer.bos_token_id, peer.eos_token_id) == (ours.unk_id, ours.bos_id, ours.eos_id)
