"""Damaged and hostile folders: each is refused in one line, which this table spells out, and nothing hangs or swells.

Rows: the file, what is wrong with it, how it comes to be, the line. {folder} stands for the folder and ~ for the file;
a line that ends in `...` goes on with words of a library.
"""

import json
import math
import os
import struct
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nemotron_h.checkpoint.save import save
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.errors import NemotronError
from nemotron_h.inference.load import load
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.text.bpe import train
from tests.checkpoint.conftest import TINY

CONFIG, INDEX, GENERATION = "config.json", "model.safetensors.index.json", "generation_config.json"
SHARD, TOKENIZER, SETTINGS = "model-00002-of-00003.safetensors", "tokenizer.json", "tokenizer_config.json"
QUANT, TEMPLATE = "hf_quant_config.json", "chat_template.jinja"
NAME, GAIN = "backbone.layers.1.mixer.up_proj.weight", "backbone.norm_f.weight"
DOWN = "backbone.layers.1.mixer.down_proj.weight"
KEEP = object()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a folder in three shards, with every companion."""
    folder = tmp_path_factory.mktemp("healthy") / "m"
    model = Hybrid(ModelConfig(layers=TINY.layers, hidden_size=32, vocab_size=300))
    initialise(model, 0)
    tokenizer = train(["to be or not to be " * 99], TokenizerConfig(vocab_size=280))
    save(model, folder, tokenizer=tokenizer, shard_bytes=30_000)
    (folder / TEMPLATE).write_text("{{ messages }}")
    (folder / SETTINGS).write_text('{"eos_token": "</s>"}')
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(healthy: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in healthy.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def refusal(folder: Path) -> str:
    started = time.monotonic()
    with warnings.catch_warnings(), pytest.raises(NemotronError) as caught:
        warnings.simplefilter("ignore")
        load(folder)
    assert time.monotonic() - started < 10
    return str(caught.value)


def content(raw: str | bytes) -> Callable[[Path], None]:
    return lambda path: void(path.write_bytes(raw if isinstance(raw, bytes) else raw.encode(errors="surrogatepass")))


def keys(**changes: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file, beginning one where there is none; KEEP as a value removes the key."""

    def edit(path: Path) -> None:
        values = (json.loads(path.read_text()) if path.exists() else {}) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not KEEP}))

    return edit


def tensors(**changes: Any) -> Callable[[Path], None]:
    """Change tensors of a file, and the index with it; KEEP removes one."""

    def edit(path: Path) -> None:
        held = load_file(path)
        held = {name: value for name, value in (held | changes).items() if value is not KEEP}
        save_file(held, path)
        index = json.loads((path.parent / INDEX).read_text())
        files = {name: file for name, file in index["weight_map"].items() if file != path.name}
        (path.parent / INDEX).write_text(json.dumps({"weight_map": files | dict.fromkeys(held, path.name)}))

    return edit


def mapped(name: str, file: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        files = json.loads(path.read_text())["weight_map"] | {name: file}
        path.write_text(json.dumps({"weight_map": files}))

    return edit


def header(text: str, length: int | None = None) -> Callable[[Path], None]:
    """A file of a safetensors header alone, its length as said."""
    return content(struct.pack("<Q", len(text) if length is None else length) + text.encode())


def sparse(size: int) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return edit


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def gone(path: Path) -> None:
    path.unlink()


def pickles_instead(path: Path) -> None:
    path.unlink()
    (path.parent / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def template_of_numbers(path: Path) -> None:
    path.with_name(TEMPLATE).unlink()
    keys(chat_template=3)(path)


def void(_: object) -> None:
    return None


WHOLE = "~: must be a whole safetensors file; got ..."
CUT_JSON = "~: must be JSON; got Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
MOE = "pattern: mixture-of-experts models (Nemotron 3 Nano, Super, Ultra) are not supported; got 'E' at layer "
OTHER_TENSOR = (
    "is not a tensor of the model that config.json describes (1 such in {folder}); is config.json of this checkpoint?"
)
QUANTISED = "~: quantization_config: quant_method must be modelopt; got "
BEFORE = "; take the checkpoint before quantisation"
FORMATS = "~: quant_algo must be FP8 or NVFP4; got "
HUGE = {"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1}

ROWS: list[tuple[str, str, Callable[[Path], None], str]] = [
    (CONFIG, "missing", gone, "~: must exist; found no such file; is this a checkpoint folder?"),
    (CONFIG, "a folder", folder_instead, "~: must be a file; got something else"),
    (CONFIG, "a pipe", pipe_instead, "~: must be a file; got something else"),
    (CONFIG, "cut", content("{"), CUT_JSON),
    (CONFIG, "empty", content(""), "~: must be JSON; got Expecting value: line 1 column 1 (char 0)"),
    (
        CONFIG,
        "not UTF-8",
        content(b"\xff"),
        "~: must be JSON; got 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ),
    (CONFIG, "a list", content("[1]"), "~: must hold a JSON object; got list"),
    (CONFIG, "100,000 brackets", content("[" * 100_000), "~: must be JSON; got ..."),
    (
        CONFIG,
        "a number of 5,000 digits",
        content('{"hidden_size": ' + "9" * 5000 + "}"),
        "~: must be JSON; got Exceeds the limit ...",
    ),
    (CONFIG, "16 GiB", sparse(2**34), "~: must have at most 16,777,216 bytes; got 17,179,869,184"),
    (
        CONFIG,
        "another family",
        keys(model_type="llama"),
        "~: model_type: must be 'nemotron_h' or 'nemotron_h_rope'; got 'llama'",
    ),
    (
        CONFIG,
        "no family",
        keys(model_type=["\n"]),
        "~: model_type: must be 'nemotron_h' or 'nemotron_h_rope'; got ['\\n']",
    ),
    (CONFIG, "experts in the pattern", keys(hybrid_override_pattern="MEME"), "~: " + MOE + "1"),
    (CONFIG, "experts in the list", keys(hybrid_override_pattern=KEEP, layers_block_type=["moe"]), "~: " + MOE + "0"),
    (
        CONFIG,
        "an unknown layer",
        keys(hybrid_override_pattern="MX"),
        "~: pattern: must be made of 'M' Mamba-2, '*' attention, '-' FFN; got 'X' at layer 1",
    ),
    (CONFIG, "no layers", keys(hybrid_override_pattern=KEEP), "~: hybrid_override_pattern: must be given; got nothing"),
    (CONFIG, "layers that are no list", keys(layer_types=3), "~: layer_types: must be a list of strings; got 3"),
    (
        CONFIG,
        "two patterns",
        keys(layer_types=["mamba"]),
        "~: hybrid_override_pattern: must agree with layer_types, which says 'M'; got 'M-*-'",
    ),
    (
        CONFIG,
        "a million layers",
        keys(hybrid_override_pattern="-" * 10**6, num_hidden_layers=10**6),
        "~: describes 1,000,000 layers; got 23 tensors",
    ),
    (CONFIG, "4.6 * 10^18 weights", keys(**HUGE), "~: describes ..."),
    (
        CONFIG,
        "a size beyond 32 bits",
        keys(hidden_size=10**30),
        "~: hidden_size: must be an integer of 32 bits; got 1" + "0" * 30,
    ),
    (CONFIG, "a negative size", keys(hidden_size=-1), "~: hidden_size: must be at least 1; got -1"),
    (CONFIG, "a size in words", keys(hidden_size="32"), "~: hidden_size: must be an integer; got '32'"),
    (CONFIG, "groups that do not divide", keys(n_groups=3), "~: mamba.num_groups: must divide num_heads; got 3 and 4"),
    (
        CONFIG,
        "an epsilon that is none",
        keys(layer_norm_epsilon=math.nan, rms_norm_eps=math.nan),
        "~: norm_epsilon: must lie between 0 and 1; got nan",
    ),
    (
        CONFIG,
        "an end beyond the vocabulary",
        keys(eos_token_id=300),
        "~: eos_token_ids: must lie in 0..vocab_size-1 = 299; got 300",
    ),
    (CONFIG, "biases", keys(attention_bias=True), "~: attention_bias: must be False; got True"),
    (
        CONFIG,
        "another shape",
        keys(intermediate_size=47),
        DOWN + ": must have shape (32, 47) by config.json; got (32, 48) in {folder}",
    ),
    (
        CONFIG,
        "compressed-tensors",
        keys(quantization_config={"quant_method": "compressed-tensors"}),
        QUANTISED + "'compressed-tensors'" + BEFORE,
    ),
    (CONFIG, "no quantisation that is known", keys(quantization_config={}), QUANTISED + "None" + BEFORE),
    (QUANT, "blocks of FP8", keys(quantization={"quant_algo": "FP8_PB_WO"}), FORMATS + "'FP8_PB_WO'" + BEFORE),
    (QUANT, "cut", content("{"), CUT_JSON),
    (INDEX, "cut", content("{"), CUT_JSON),
    (INDEX, "no map", content("{}"), "~: weight_map must map tensors to file names; got None"),
    (INDEX, "a number for a file", mapped(NAME, 3), "~: weight_map must map tensors to file names; got {..."),
    (
        INDEX,
        "a file outside",
        mapped(NAME, "../x.safetensors"),
        "~: " + NAME + " must be in a .safetensors file of this folder; got '../x.safetensors'",
    ),
    *(
        (INDEX, what, mapped(NAME, name), "~: " + NAME + " must be in a .safetensors file of this folder; got ...")
        for what, name in (
            ("a name too long for a file", "x" * 300 + ".safetensors"),
            ("a name that is no text", "\ud800.safetensors"),
            ("a name that steers a terminal", "\x1b[2J.safetensors"),
        )
    ),
    (
        INDEX,
        "a pickle",
        mapped(NAME, "x.bin"),
        "~: " + NAME + " must be in a .safetensors file of this folder; got 'x.bin'",
    ),
    (
        INDEX,
        "a file that is not there",
        mapped(NAME, "x.safetensors"),
        "{folder}/x.safetensors: must exist; found no such file; was the last shard copied?",
    ),
    (
        INDEX,
        "another file",
        mapped(GAIN, SHARD),
        GAIN + ": must be in {folder}/" + SHARD + " by " + INDEX + "; it is not there",
    ),
    (
        INDEX,
        "a name of two lines",
        mapped("a\nb", SHARD),
        "'a\\nb': must be in {folder}/" + SHARD + " by " + INDEX + "; it is not there",
    ),
    (
        INDEX,
        "pickles alone",
        pickles_instead,
        "{folder}: must hold model.safetensors or "
        + INDEX
        + "; got neither; pytorch_model.bin is a pickle, which is never loaded; convert it",
    ),
    (SHARD, "missing", gone, "~: must exist; found no such file; was the last shard copied?"),
    (SHARD, "a pipe", pipe_instead, "~: must be a file; got something else"),
    (SHARD, "empty", content(""), "~: must be a whole safetensors file; got 0 bytes that are not (..."),
    (SHARD, "cut", cut, WHOLE),
    (SHARD, "a pickle", content(b"\x80\x04."), WHOLE),
    (SHARD, "a header of 2^63 bytes", header("{}", 2**63), WHOLE),
    (SHARD, "a header of 90 MB", header("{" + " " * 90_000_000), WHOLE),
    (SHARD, "a header that is no JSON", header("{{"), WHOLE),
    (
        SHARD,
        "a shape beyond memory",
        header('{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
        WHOLE,
    ),
    (SHARD, "offsets beyond the file", header('{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}'), WHOLE),
    (
        SHARD,
        "a tensor left out",
        tensors(**{NAME: KEEP}),
        NAME + ": missing from {folder} (found 22 of 23 tensors); was the last shard copied?",
    ),
    (SHARD, "a tensor more", tensors(extra=torch.ones(1)), "extra: " + OTHER_TENSOR),
    (
        SHARD,
        "a tensor of integers",
        tensors(**{NAME: torch.ones(48, 32, dtype=torch.int32)}),
        NAME + ": must be one of bfloat16, float16, float32, float64; got torch.int32 in {folder}",
    ),
    (
        SHARD,
        "a tensor transposed",
        tensors(**{NAME: torch.ones(32, 48)}),
        NAME + ": must have shape (48, 32) by config.json; got (32, 48) in {folder}",
    ),
    (
        SHARD,
        "a tensor under both names",
        tensors(**{"model" + NAME.removeprefix("backbone"): torch.ones(48, 32)}),
        "model" + NAME.removeprefix("backbone") + ": must be there once; got " + NAME + " beside it",
    ),
    (GENERATION, "cut", content("{"), CUT_JSON),
    (GENERATION, "an end in words", keys(eos_token_id="</s>"), "~: eos_token_id: must be an integer; got '</s>'"),
    (
        GENERATION,
        "an end beyond the vocabulary",
        keys(eos_token_id=[2, 300]),
        "generation_config.json: eos_token_id must lie in 0..vocab_size-1 = 299; got 300",
    ),
    (GENERATION, "a temperature in words", keys(temperature="hot"), "~: temperature: must be a number; got 'hot'"),
    (
        TOKENIZER,
        "cut",
        content("{"),
        CUT_JSON + "; was the copy cut short?",
    ),
    (
        TOKENIZER,
        "words, not bytes",
        keys(pre_tokenizer={"type": "Whitespace"}),
        "~: pre_tokenizer must be ByteLevel, as in the family; got 'Whitespace'",
    ),
    (
        TOKENIZER,
        "ids beyond the model's",
        keys(added_tokens=[{"id": 400, "content": "<x>", "special": True}]),
        "tokenizer.json: has 401 ids; the model's vocabulary is 300; take the tokenizer the model was trained with",
    ),
    (
        SETTINGS,
        "an end that is no token",
        keys(eos_token="<end>"),
        "~: eos_token must name a token of tokenizer.json; got '<end>'",
    ),
    (
        SETTINGS,
        "a template of another kind",
        template_of_numbers,
        "~: chat_template must be a text or a list of named ones; got 3",
    ),
    (TEMPLATE, "not UTF-8", content(b"ab\xff"), "~: must be UTF-8 text; got other bytes at place 2"),
    ("LICENSE", "1 TiB", sparse(2**40), "~: must be a file of at most 16,777,216 bytes; got 1,099,511,627,776"),
]


def test_the_folder_is_healthy(folder: Path) -> None:
    """Else every row would be red for another reason."""
    assert load(folder).generate("to be", max_tokens=2, ignore_end=True) is not None
    assert len(ROWS) >= 40


@pytest.mark.parametrize(("name", "what", "damage", "line"), ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_damage_is_one_line(name: str, what: str, damage: Callable[[Path], None], line: str, folder: Path) -> None:
    damage(folder / name)
    got, want = refusal(folder), line.replace("~", f"{folder}/{name}").replace("{folder}", str(folder))
    assert got.isprintable()
    assert len(got) < 600
    if want.endswith("..."):
        assert got.startswith(want.removesuffix("..."))
    else:
        assert got == want


# Anything that JSON can say, and what a size, a shape or a name would be hurt by most.
NASTY = st.sampled_from(
    [0, -1, 1, 2**31, 2**63, 10**400, 1e308, math.inf, math.nan, "", "\n", "\ud800", "é" * 999, [], {}, None]
)
JSON = st.recursive(
    NASTY | st.booleans() | st.integers(-2, 99) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


def loads_or_is_refused(files: dict[str, bytes]) -> None:
    """In a few seconds, and in one line."""
    with tempfile.TemporaryDirectory() as path:
        for name, data in files.items():
            (Path(path) / name).write_bytes(data)
        started = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load(path)
            except NemotronError as error:
                assert str(error).isprintable()
                assert len(str(error)) < 600
        assert time.monotonic() - started < 10


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode(errors="surrogatepass")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value holds others, the first few of each list and object."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in list(inner)[:40] for place in places(part, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@st.composite
def damaged_json(draw: st.DrawFn, source: bytes) -> bytes:
    """A JSON file with one to three of its values replaced by others."""
    value = json.loads(source)
    for _ in range(draw(st.integers(1, 3))):
        value = replaced(value, draw(st.sampled_from(places(value))), draw(JSON))
    return dumped(value)


@st.composite
def damaged_bytes(draw: st.DrawFn, source: bytes) -> bytes:
    """A file with some of its first bytes replaced, and perhaps cut or grown."""
    data = bytearray(source)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, min(len(data) - 1, 2000)))
        data[place : place + 1] = draw(st.binary(max_size=3))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@st.composite
def damaged_header(draw: st.DrawFn, source: bytes) -> bytes:
    """A safetensors file whose header is JSON, of the right length, and says something else."""
    (length,) = struct.unpack("<Q", source[:8])
    header = draw(damaged_json(source[8 : 8 + length]))
    return struct.pack("<Q", len(header)) + header + source[8 + length :]


def fuzz(healthy: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([CONFIG, INDEX, SHARD, TOKENIZER, SETTINGS, GENERATION, TEMPLATE]))
    ways = [damaged_bytes(healthy[name])]
    if name == SHARD:
        ways.append(damaged_header(healthy[name]))
    elif name != TEMPLATE:
        ways.append(damaged_json(healthy[name]))
    loads_or_is_refused(healthy | {name: data.draw(st.one_of(ways))})


@settings(max_examples=120)
@given(data=st.data())
def test_damage_at_random_is_one_line(healthy: dict[str, bytes], data: st.DataObject) -> None:
    fuzz(healthy, data)


@pytest.mark.slow
@settings(max_examples=5000)
@given(data=st.data())
def test_much_damage_at_random_is_one_line(healthy: dict[str, bytes], data: st.DataObject) -> None:
    fuzz(healthy, data)
