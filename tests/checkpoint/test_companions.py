"""What lies beside the weights goes into anything that is made from a checkpoint."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.checkpoint.companions import Companions, end_ids, read_companions
from nemotron_h.checkpoint.save import save
from nemotron_h.config.generation import GENERATION_FILE, Generation
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.errors import CheckpointError, ConfigError
from nemotron_h.inference.load import load
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.text.bpe import train
from nemotron_h.text.tokenizer import TEMPLATE_FILE, Tokenizer

Build = Callable[..., Hybrid]
JINJA = "{{ '<SPECIAL_10>System\\n' }}\r\n{%- for message in messages %} ü {% endfor %}"
CARD = """---
license: other
license_name: nvidia-open-model-license
license_link: LICENSE
base_model:
- nvidia/first
language: en
---
# A parent
"""


@pytest.fixture
def folder(build: Build, tmp_path: Path) -> Path:
    save(build(), tmp_path / "parent")
    return tmp_path / "parent"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["a b c d e " * 50], TokenizerConfig(vocab_size=259 + 2, reserved_tokens=0))


def test_everything_is_carried_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    generation = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "max_length": 99, "bos_token_id": 3}
    (folder / GENERATION_FILE).write_text(json.dumps(generation))
    files = {
        TEMPLATE_FILE: JINJA.encode(),
        "LICENSE": b"\xff not UTF-8",
        "LICENSE-data.txt": b"data\r\n",
        "NOTICE": b"notice",
        "NOTICE.md": b"# notice\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text(CARD)
    load(folder, precision="float32").save(tmp_path / "child")
    for name, content in files.items():
        assert (tmp_path / "child" / name).read_bytes() == content, name
    assert json.loads((tmp_path / "child" / GENERATION_FILE).read_text()) == generation | {"pad_token_id": 0}
    before, after = read_companions(folder), read_companions(tmp_path / "child")
    assert (after.chat_template, after.legal) == (before.chat_template, before.legal)
    assert after.generation.sampling() == before.generation.sampling()
    card = (tmp_path / "child" / "README.md").read_text()
    assert "license_name: nvidia-open-model-license\n" in card
    assert "base_model:\n- nvidia/first\n" in card


def test_a_first_checkpoint_has_what_can_be_said(folder: Path) -> None:
    assert json.loads((folder / GENERATION_FILE).read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [2],
        "pad_token_id": 0,
    }
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "config.json", GENERATION_FILE, "model.safetensors"]
    companions = read_companions(folder)
    assert companions.chat_template is None
    assert companions.legal == {}


@pytest.mark.parametrize(
    ("value", "template"),
    [
        (JINJA, JINJA),
        ([{"name": "rag", "template": "other"}, {"name": "default", "template": JINJA}], JINJA),
        (None, None),
    ],
)
def test_a_template_in_the_tokenizers_settings(value: Any, template: str | None, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    assert read_companions(folder).chat_template == template
    (folder / TEMPLATE_FILE).write_text("from the file")
    assert read_companions(folder).chat_template == "from the file"


def test_named_templates_without_a_default_are_said(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"chat_template": [{"name": "rag", "template": "other"}]}')
    with pytest.warns(UserWarning, match=r"tokenizer_config\.json: chat_template has none named default; the family's"):
        assert read_companions(folder).chat_template is None


@pytest.mark.parametrize("value", [3, {"default": "x"}, [{"name": "default", "template": 3}], "\ud800"])
def test_a_template_that_is_no_text_is_named(value: Any, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json: chat_template must be a text or a list of named"
    ):
        read_companions(folder)


def test_end_tokens_are_asked_for_in_order(config: ModelConfig, tokenizer: Tokenizer) -> None:
    said, silent = Generation(end_ids=(5, 6)), Generation()
    config = replace(config, vocab_size=300, eos_token_ids=(7,))
    nothing = replace(config, eos_token_ids=())
    assert end_ids(said, config, tokenizer) == (5, 6)
    assert end_ids(silent, config, tokenizer) == (7,)
    assert end_ids(silent, nothing, tokenizer) == (tokenizer.eos_id,) == (2,)
    assert end_ids(silent, nothing, None) == ()
    with pytest.raises(ConfigError, match=r"^generation_config.json: eos_token_id must lie in 0\.\..* = 299; got 300$"):
        end_ids(Generation(end_ids=(5, 300)), config, None)


def test_end_tokens_end_what_is_generated(folder: Path, tmp_path: Path) -> None:
    language = load(folder, precision="float32")
    whole = list(language.tokens([5, 9], max_tokens=12, ignore_end=True))
    (folder / GENERATION_FILE).write_text(json.dumps({"eos_token_id": [whole[4], whole[2]]}))
    cut = whole[: min(whole.index(whole[4]), whole.index(whole[2]))]
    language = load(folder, precision="float32")
    assert list(language.tokens([5, 9], max_tokens=12)) == cut
    language.save(tmp_path / "child")
    assert json.loads((tmp_path / "child" / GENERATION_FILE).read_text())["eos_token_id"] == [whole[4], whole[2]]


def test_a_whole_card_is_not_needed_to_generate(folder: Path, tmp_path: Path) -> None:
    """A damaged card is refused where a licence would be lost, and nowhere else."""
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    language = load(folder)
    with pytest.raises(CheckpointError, match=r"^README\.md: front matter must be YAML of a model card; got"):
        language.save(tmp_path / "child")
    assert not (tmp_path / "child").exists()


def test_too_large_a_file_is_named_unread(folder: Path) -> None:
    with (folder / "LICENSE").open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(
        CheckpointError, match=r"LICENSE: must be a file of at most 16,777,216 bytes; got 17,179,869,184$"
    ):
        read_companions(folder)


def test_companions_of_nothing_are_the_default(build: Build, tmp_path: Path) -> None:
    save(build(), tmp_path / "a")
    save(build(), tmp_path / "b", companions=Companions())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_model_of_the_hub_without_its_card_is_said(build: Build, tmp_path: Path) -> None:
    """Another program may have fetched config and weights alone: the licence is elsewhere, not absent."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    save(build(), snapshot)
    companions = read_companions(snapshot)
    save(build(), tmp_path / "a", companions=companions)
    (snapshot / "README.md").unlink()
    with pytest.warns(
        UserWarning, match=r"^org/name: has no README\.md here, .* `nemotron-h pull org/name` fetches it"
    ):
        save(build(), tmp_path / "b", companions=read_companions(snapshot))


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not a licence")
    (folder / "LICENSE").unlink(missing_ok=True)
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"LICENSE: must lie in its own folder; got a link to .*secret"):
        read_companions(folder)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blob = tmp_path / "models--org--name" / "blobs" / "1234"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("the licence")
    (snapshot / "config.json").write_bytes((folder / "config.json").read_bytes())
    (snapshot / "LICENSE").symlink_to(blob)
    assert read_companions(snapshot).legal == {"LICENSE": b"the licence"}
