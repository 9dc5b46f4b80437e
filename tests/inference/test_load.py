"""Text in, text out."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nemotron_h
from nemotron_h.checkpoint import download
from nemotron_h.checkpoint.load import load as load_model
from nemotron_h.checkpoint.save import save
from nemotron_h.config.cost import weight_bytes
from nemotron_h.config.published import read_config
from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import CapacityError, CheckpointError, DataError, RequestError
from nemotron_h.inference import load as room
from nemotron_h.inference import naive
from nemotron_h.inference.load import LanguageModel, load, needed_by, needed_bytes, read
from nemotron_h.inference.sampling import Sampler
from nemotron_h.machine import Memory
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.text.tokenizer import TOKENIZER_FILE, Tokenizer
from tests.checkpoint.test_quantised import fp8, quantise
from tests.checkpoint.test_quantised import matrices as fp8_matrices

Build = Callable[..., Hybrid]


@pytest.fixture
def language(folder: Path) -> LanguageModel:
    """Plain: some tests change its weights."""
    return read(folder, dtype=torch.float32)


def test_the_text_is_that_of_the_tokens(language: LanguageModel, tokenizer: Tokenizer) -> None:
    prompt = "the hybrid"
    assert language.prompt_ids(prompt) == [1, *tokenizer.encode(prompt)]
    with torch.no_grad():
        language.model.head_weight[tokenizer.vocab_size :] = 0  # padded ids would never be drawn anyway
        language.model.head_weight[: tokenizer.vocab_size] *= 4
    options = {"max_tokens": 30, "ignore_end": True}
    text = language.generate(prompt, temperature=0.5, seed=3, **options)
    sampling = Sampling(temperature=0.5, seed=3)
    ids = list(language.tokens(language.prompt_ids(prompt), sampling=sampling, **options))
    assert max(ids) < tokenizer.vocab_size
    assert text == tokenizer.decode(ids)


def test_padded_ids_are_never_drawn_as_text(build: Build, tokenizer: Tokenizer) -> None:
    """The likeliest ids by far stand for no text."""
    model = build()
    with torch.no_grad():
        model.head_weight[320:] = 3 * model.head_weight[:32]
    language = LanguageModel(model, tokenizer)
    options: dict[str, Any] = {"max_tokens": 40, "sampling": Sampling(temperature=2.0), "ignore_end": True}
    assert max(language.tokens([5, 9], **options)) < tokenizer.vocab_size
    # ids alone: the model's whole vocabulary
    assert max(LanguageModel(model, None).tokens([5, 9], **options)) >= tokenizer.vocab_size
    for temperature in (0.0, 2.0):
        assert language.generate("the", max_tokens=40, temperature=temperature, ignore_end=True)


def test_ids_that_the_tokenizer_skips_are_never_drawn_as_text(
    build: Build, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A control token far above the others leaves a hole, and there the likeliest ids by far."""
    tokenizer.save(tmp_path)
    data = json.loads((tmp_path / TOKENIZER_FILE).read_text(encoding="utf-8"))
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 349, "content": "<SPECIAL_349>"})
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps(data), encoding="utf-8")
    model = build()
    with torch.no_grad():
        model.head_weight[320:349] = 3 * model.head_weight[:29]
    language = LanguageModel(model, Tokenizer.load(tmp_path))
    options: dict[str, Any] = {"max_tokens": 40, "sampling": Sampling(temperature=2.0), "ignore_end": True}
    assert any(320 <= token < 349 for token in LanguageModel(model, None).tokens([5, 9], **options))
    assert not any(320 <= token < 349 for token in language.tokens([5, 9], **options))
    for temperature in (0.0, 2.0):
        assert language.generate("the", max_tokens=40, temperature=temperature, ignore_end=True)


def test_whole_characters_come(language: LanguageModel) -> None:
    sampling = Sampling(temperature=3.0, seed=2)  # nearly uniform: half characters everywhere
    pieces = list(language.stream("the", max_tokens=300, sampling=sampling, ignore_end=True))
    text = "".join(pieces)
    assert text == language.generate("the", max_tokens=300, temperature=3.0, seed=2, ignore_end=True)
    assert len([piece for piece in pieces if piece]) > 50
    for piece in pieces:
        piece.encode()


def test_multibyte_characters_survive_the_stream(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = load(folder)
    ids = [token for letter in "世界🙂Köln" for byte in letter.encode() for token in [byte_id(tokenizer, byte)]]
    drawn = iter(ids)
    monkeypatch.setattr(Sampler, "draw", lambda self, logits: next(drawn))
    pieces = list(language.stream("x", max_tokens=len(ids)))
    assert "".join(pieces) == "世界🙂Köln"
    assert "\ufffd" not in "".join(pieces)


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([byte]))


@pytest.mark.parametrize("as_list", [True, False])
def test_it_stops_before_a_stop_string(language: LanguageModel, as_list: bool) -> None:
    text = language.generate("the", max_tokens=60, temperature=1.0, seed=1, ignore_end=True)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    got = language.generate(
        "the", max_tokens=60, temperature=1.0, seed=1, ignore_end=True, stop=[stop] if as_list else stop
    )
    assert got == text[: text.index(stop)]


def test_end_tokens_end_unless_ignored(language: LanguageModel, build: Build, tokenizer: Tokenizer) -> None:
    whole = list(language.tokens([5, 9], max_tokens=12, ignore_end=True))
    config = replace(language.model.config, eos_token_ids=(whole[3], whole[6]))
    model = language.model
    model.config = config
    ended = LanguageModel(model, tokenizer)
    first = min(whole.index(whole[3]), whole.index(whole[6]))
    assert list(ended.tokens([5, 9], max_tokens=12)) == whole[:first]
    assert list(ended.tokens([5, 9], max_tokens=12, ignore_end=True)) == whole


def test_refusals(build: Build, folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    language = load(folder)
    with pytest.raises(RequestError, match="max_tokens: must be 1 or above; got 0"):
        language.generate("x", max_tokens=0)
    with pytest.raises(nemotron_h.NemotronError, match="temperature: must be 0 or above; got -1"):
        language.generate("x", temperature=-1.0)
    with pytest.raises(RequestError, match="stop: must not hold an empty string"):
        language.generate("x", stop="")
    said = r"precision: must be one of auto, bfloat16, float32, int8, int4; got 'int3'"
    with pytest.raises(RequestError, match=said):
        load(folder, precision="int3")
    save(build(), tmp_path / "ids")
    with pytest.raises(RequestError, match=r"prompt: needs a tokenizer.json in the checkpoint folder"):
        load(tmp_path / "ids").generate("x")
    assert len(list(load(tmp_path / "ids").tokens([1, 2], max_tokens=4, ignore_end=True))) == 4


def test_a_tokenizer_that_does_not_fit_is_refused(folder: Path, build: Build, tmp_path: Path) -> None:
    small = Hybrid(replace(build().config, vocab_size=300))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    with pytest.raises(CheckpointError, match=r"tokenizer.json: has 320 ids; the model's vocabulary is 300"):
        save(small, tmp_path / "small", tokenizer=Tokenizer.load(folder))
    assert not (tmp_path / "small").exists()
    save(small, tmp_path / "small")
    Tokenizer.load(folder).save(tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: has 320 ids"):
        load(tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: has 320 ids"):
        LanguageModel(small, Tokenizer.load(folder))


def test_an_empty_prompt_begins_a_text(language: LanguageModel) -> None:
    assert language.prompt_ids("") == [language.model.config.bos_token_id]
    assert isinstance(language.generate("", max_tokens=3, ignore_end=True), str)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """A machine that multiplies bfloat16 and float32 at these rates."""

    def rates(bfloat16: float, float32: float) -> None:
        monkeypatch.setattr(room, "rates", lambda device: {"bfloat16": bfloat16, "float32": float32})

    return rates


def test_bfloat16_is_the_default(folder: Path, measured: Callable[[float, float], None]) -> None:
    measured(400e9, 170e9)
    assert load(folder).model.compute_dtype == torch.bfloat16
    assert load(folder, precision="float32").model.head_weight.dtype == torch.float32


def test_what_was_loaded_is_packed_frozen_and_saved_as_it_was(
    folder: Path, tmp_path: Path, measured: Callable[[float, float], None]
) -> None:
    measured(400e9, 170e9)
    language = load(folder, precision="bfloat16")
    assert not any(parameter.requires_grad for parameter in language.model.parameters())
    language.save(tmp_path / "again")
    first, again = (read(path, dtype=torch.bfloat16).model for path in (folder, tmp_path / "again"))
    for (name, mine), theirs in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    ids = list(language.tokens([5, 9], max_tokens=5, ignore_end=True))
    plain = LanguageModel(first, language.tokenizer)
    assert ids == list(plain.tokens([5, 9], max_tokens=5, ignore_end=True))


def test_without_kernels_auto_takes_what_the_machine_multiplies_fast(
    folder: Path, measured: Callable[[float, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(2e9, 100e9)
    assert load(folder).model.compute_dtype == torch.bfloat16  # kernels widen it
    monkeypatch.setattr(room.compiler, "MISSING", "numba is not installed")
    measured(400e9, 170e9)
    assert load(folder).model.compute_dtype == torch.bfloat16
    measured(2e9, 100e9)
    assert load(folder).model.compute_dtype == torch.float32
    with pytest.warns(UserWarning, match=r"^bfloat16 is 50 times slower than float32 here; take precision=auto$"):
        assert load(folder, precision="bfloat16").model.compute_dtype == torch.bfloat16


def test_what_cannot_fit_is_refused_with_both_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, measured: Callable[[float, float], None]
) -> None:
    measured(400e9, 170e9)
    config = read_config(folder / "config.json")
    narrow, wide = (needed_bytes(config, name) for name in ("bfloat16", "float32"))
    weights = sum(p.nbytes for p in read(folder, dtype=torch.bfloat16).model.parameters())
    assert weights < narrow < 1.6 * weights  # a model this small is half a table
    monkeypatch.setattr(room.machine, "memory", lambda: Memory(10**12, 10**7, narrow))
    assert load(folder, precision="bfloat16")
    said = f"{folder}: needs {wide:,} bytes of memory in float32; {narrow:,} of 10,000,000 are free; "
    with pytest.raises(CapacityError, match=f"^{re.escape(said)}bfloat16 would fit$"):
        load(folder, precision="float32")
    monkeypatch.setattr(room.machine, "memory", lambda: Memory(10**12, 10**7, narrow - 1))
    with pytest.raises(CapacityError, match=r"are free; int8 would fit$"):
        load(folder, precision="bfloat16")
    monkeypatch.setattr(room.machine, "memory", lambda: Memory(10**12, 10**7, 10**4))
    with pytest.raises(CapacityError, match=r"are free; nothing else would fit; take a smaller model$"):
        load(folder, precision="bfloat16")


def test_what_is_not_mapped_needs_room_before_it_is_rounded(folder: Path, tmp_path: Path) -> None:
    """Weights in float32, in FP8, or on a GPU are in bfloat16 first; those in integers lie where they are."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    config = read_config(folder / "config.json")
    sizes = {name: sum(weight_bytes(config, name).values()) for name in ("bfloat16", "int4")}
    largest = 4 * config.vocab_size * config.hidden_size
    save(load_model(folder, dtype=torch.float32), tmp_path / "wide", dtype=torch.float32)
    save(load_model(folder, dtype=torch.float32), tmp_path / "fp8", dtype=torch.float32)
    quantise(tmp_path / "fp8", dict.fromkeys(fp8_matrices(tmp_path / "fp8"), fp8))
    for path, device, held in (
        (folder, cpu, "int4"), (folder, gpu, "bfloat16"), (tmp_path / "wide", cpu, "bfloat16"),
        (tmp_path / "fp8", cpu, "bfloat16"),
    ):  # fmt: skip
        assert needed_by(path, device)["int4"] == sizes[held] + largest
    language = load(folder, precision="int4")
    language.save(tmp_path / "int4")
    assert needed_by(tmp_path / "int4", cpu) == {"int4": sizes["int4"]}


def test_rows_are_rounded_by_random_tokens_only_aloud(folder: Path, tmp_path: Path) -> None:
    save(load_model(folder), tmp_path / "bare")
    with pytest.warns(UserWarning, match=r"bare: has no tokenizer; rows are rounded as finely as random tokens ask$"):
        load(tmp_path / "bare", precision="int8")


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "meta", "tpu", ""])
def test_a_device_that_is_not_here_is_refused(folder: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RequestError, match=rf"^device: must be .*; got '{device}'"):
        load(folder, device=device)


def test_a_name_of_the_hub_is_looked_for_and_a_path_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(download, "resolve", lambda path: asked.append(path) or folder)
    load("org/name@main")
    assert asked == ["org/name@main"]


def test_a_message_is_answered_through_the_checkpoints_template(folder: Path, tokenizer: Tokenizer) -> None:
    language = read(folder, dtype=torch.float32)
    source = (
        "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    own = LanguageModel(language.model, tokenizer, replace(language.companions, chat_template=source))
    got = "".join(own.chat([{"role": "user", "content": "the hybrid"}], max_tokens=12, sampling=Sampling()))
    ids = [1, *tokenizer.encode("the hybrid:")]
    new = naive.tokens(
        language.model,
        ids,
        max_tokens=12,
        sampling=Sampling(),
        ends=language.model.config.eos_token_ids,
        drawn_from=tokenizer.known_ids,
    )
    assert got == tokenizer.decode(new)
    with pytest.raises(RequestError, match=r"^enable_thinking: must be a variable of the chat template; it has none"):
        own.chat([{"role": "user", "content": "x"}], variables={"enable_thinking": True})


def test_a_precision_that_is_never_slow_is_not_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "rates", lambda device: pytest.fail("measured"))
    assert load(folder, precision="float32").model.compute_dtype == torch.float32


def test_the_marks_of_thinking_are_in_a_reply_though_they_are_control_tokens(
    build: Build, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Nemotron 3, whose `</think>` is a special token."""
    data = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 330, "content": "</think>", "special": True})
    (folder / TOKENIZER_FILE).write_text(json.dumps(data), encoding="utf-8")
    language = read(folder, dtype=torch.float32)
    assert language.tokenizer is not None
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    own = LanguageModel(language.model, language.tokenizer, replace(language.companions, chat_template=source))
    ids = [*language.tokenizer.encode("so"), 330, *language.tokenizer.encode("yes"), *own.model.config.eos_token_ids]
    drawn = iter(ids)
    monkeypatch.setattr(Sampler, "draw", lambda self, logits: next(drawn))
    assert "".join(own.chat([{"role": "user", "content": "the"}])) == "so</think>yes"


def test_keys_and_values_in_int8(folder: Path, tmp_path: Path) -> None:
    language = load(folder, keys_values="int8")
    assert language.model.keys_values == torch.int8
    ids = list(language.tokens([5, 9], max_tokens=20, ignore_end=True))
    assert language.tokenizer is not None
    known = language.tokenizer.known_ids
    plain = naive.tokens(language.model, [5, 9], max_tokens=20, sampling=Sampling(), drawn_from=known)
    assert ids == list(plain)
    language.engine.session([5, 9, *ids]).save(tmp_path / "session")
    again = load(folder, keys_values="int8")
    assert again.engine.restore(tmp_path / "session").ids == [5, 9, *ids]
    with pytest.raises(DataError, match=r"keys_values is int8 there, as computed here$"):
        load(folder).engine.restore(tmp_path / "session")
    with pytest.raises(RequestError, match=r"^keys_values: must be one of auto, int8; got 'int4'$"):
        load(folder, keys_values="int4")
