"""The model card states what its parent stated and nothing more, in YAML that the Hub's own library reads."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from nemotron_h.checkpoint.card import card, front_matter, parent_name
from nemotron_h.errors import CheckpointError


def read_back(text: str) -> dict[str, Any]:
    data: dict[str, Any] = ModelCard(text).data.to_dict()
    return data


def test_a_card_without_a_parent_states_no_licence() -> None:
    text = card(made_by="nemotron-h x", parent=None, parent_card=None, library="transformers")
    data = read_back(text)
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nemotron-h", "mamba-2", "hybrid"],
    }
    assert "- Licence: none is stated.\n" in text
    assert "- Made by `nemotron-h x`: nemotron_h " in text
    assert "- Made from no other checkpoint.\n" in text


STATED = "---\nlicense: other\nlicense_name: nscl\nlicense_link: https://x.org/l\nbase_model: a/b\ntags: [z]\n---\n"


@pytest.mark.parametrize(("parent", "base"), [("nvidia/Nemotron-H-8B", "nvidia/Nemotron-H-8B"), ("local", "a/b")])
def test_a_parents_statements_are_carried(parent: str, base: str) -> None:
    text = card(made_by="x", parent=parent, parent_card=STATED, library=None)
    data = read_back(text)
    assert data["base_model"] == base
    assert {key: data[key] for key in data if key.startswith("license")} == {
        "license": "other",
        "license_name": "nscl",
        "license_link": "https://x.org/l",
    }
    assert "z" not in data["tags"]
    assert f"- Made from {parent}.\n" in text
    assert "- Licence: nscl, https://x.org/l.\n" in text
    assert front_matter(text) == {**front_matter(STATED), "base_model": base}  # and by a grandchild again


@pytest.mark.parametrize("text", ["", "# Title\n", "no front matter\n---\nlicense: mit\n---\n"])
def test_without_front_matter_nothing_is_stated(text: str) -> None:
    assert front_matter(text) == {}


@pytest.mark.parametrize(
    "text",
    [
        "---\nlicense: [\n---\n",
        "---\n- 1\n---\n",
        "---\n3: 1\n---\n",
        "---\nlicense: {a: 1}\n---\n",
        "---\nbase_model: [1]\n---\n",
        "---\nlicense: 2024-01-01\n---\n",
        "---\n" + "[" * 30_000 + "\n---\n",
        "---\nx: !!python/object/apply:os.mkdir [sprung]\n---\n",
        "---\nlicense: mit\nmodel-index: [x]\n---\n",
        "---\nmodel-index: [{name: a, results: [{task: {type: a}, dataset: {type: a, name: a}, source: b}]}]\n---\n",
        "---\nlicense: mit\ndescription: " + "x" * 70_000 + "\n---\n",
    ],
)
def test_a_damaged_card_is_refused_in_one_line(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^README\.md: .* must be .*; mend it$") as caught:
        front_matter(text)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_values_that_repeat_themselves_cost_nothing() -> None:
    """Each line holds the one before ten times: 10^9 strings, if anyone wrote them out."""
    lines = ["a0: &a0 [lol, lol]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))]
    assert front_matter("---\n" + "\n".join(lines) + "\nlicense: mit\n---\n") == {"license": "mit"}
    with pytest.raises(CheckpointError, match="license must be a string or a list of them"):
        front_matter("---\n" + "\n".join(lines) + "\nlicense: *a9\n---\n")


def test_a_folder_of_the_hubs_cache_has_the_hubs_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--nvidia--Nemotron-H-8B-Base-8K" / "snapshots" / "abc"
    assert parent_name(snapshot) == "nvidia/Nemotron-H-8B-Base-8K"
    assert parent_name(tmp_path / "mine") == "mine"


def test_a_folder_goes_by_its_real_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    assert parent_name(tmp_path / "link") == "org/name"
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "deeper")
    assert parent_name(Path("..")) == "mine"


def test_a_mark_before_the_front_matter_loses_nothing() -> None:
    assert front_matter("\ufeff" + STATED) == front_matter(STATED)


def test_front_matter_may_be_long_and_a_text_longer() -> None:
    assert front_matter(STATED + "x" * 10**6) == front_matter(STATED)
    assert front_matter("--- a rule\n" + "x\n---\n" + "x" * 10**6) == {}
