from importlib import resources
from pathlib import Path

import pytest

from nemotron_h.config.presets import PRESETS
from nemotron_h.config.recipe import SamplesConfig, overridden, read_recipe, toml_value
from nemotron_h.errors import ConfigError

FOLDER = resources.files("nemotron_h") / "recipes"
NAMES = sorted(entry.name.removesuffix(".toml") for entry in FOLDER.iterdir() if entry.name.endswith(".toml"))
TEXT = """
stages = ["train"]
[tokenizer]
vocab_size = 300
[model]
preset = "3m"
[train]
steps = 10
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    return path


def test_there_are_recipes() -> None:
    assert "laptop" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_of_the_package_parses(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.model_config is PRESETS[recipe.model.preset]


def test_the_laptop_recipe_takes_four_minutes_as_a_rule() -> None:
    recipe = read_recipe("laptop")
    assert set(recipe.limit_seconds) == set(recipe.stages)
    assert sum(recipe.limit_seconds.values()) <= 240


def test_prompts_end_where_a_word_may_begin() -> None:
    assert [prompt for prompt in SamplesConfig().prompts if prompt != prompt.rstrip()] == []


@pytest.mark.parametrize(
    "text", ["5\nfoo = 7", "5 # steps", "5, 6", "5,", "[1] # one", '"a" # b', "# a", "5]", "5\n# a\n"]
)
def test_nothing_of_an_override_is_dropped(text: str) -> None:
    assert toml_value(text) == text


def test_an_override_is_one_toml_value() -> None:
    texts = ["5", " 5 ", "1e-3", '"a # b"', '"""a\nb"""', "[1, 2]", "[1,\n 2,\n]", "{a = 1}", "true", ""]
    assert [toml_value(text) for text in texts] == [5, 5, 1e-3, "a # b", "a\nb", [1, 2], [1, 2], {"a": 1}, True, ""]


def test_a_file_is_read_and_named_after_itself(file: Path) -> None:
    recipe = read_recipe(str(file))
    assert (recipe.name, recipe.stages, recipe.train.steps) == ("mine", ("train",), 10)


def test_overrides_are_toml_values_or_plain_strings(file: Path) -> None:
    overrides = [
        "train.steps=200",
        "train.learning_rate=1e-3",
        "model.preset=25m",
        "name=other",
        'stages=["train", "samples"]',
        "samples.max_tokens=7",
        "train.decay=stable",
        "train.decay_fraction=0.5",
    ]
    recipe = read_recipe(str(file), overrides)
    assert (recipe.train.steps, recipe.train.learning_rate, recipe.train.decay.value) == (200, 1e-3, "stable")
    assert (recipe.model.preset, recipe.name, recipe.stages) == ("25m", "other", ("train", "samples"))
    assert recipe.samples.max_tokens == 7


def test_overriding_leaves_what_it_was_given_alone() -> None:
    values = {"train": {"steps": 1}}
    assert overridden(values, ["train.steps=2", "a.b.c=3"]) == {"train": {"steps": 2}, "a": {"b": {"c": 3}}}
    assert values == {"train": {"steps": 1}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.setps=2"], r"^train\.setps: unknown setting; did you mean steps\?$"),
        (["trian.steps=2"], r"^trian: unknown setting; did you mean train\?$"),
        (['train.steps="2"'], r"^train\.steps: must be a valid integer; got '2'$"),
        (["train.steps=true"], r"^train\.steps: must be a valid integer; got True$"),
        (["train.steps=0"], r"^train\.steps: must be 1 or above; got 0$"),
        (["train.steps"], r"^override: must read table\.key=value; got 'train\.steps'$"),
        (["=3"], r"^override: must read table\.key=value; got '=3'$"),
        (["name.x=3"], r"^name\.x: must name a setting in a table; got name, which is a value$"),
        (["model.preset=9b"], r"^preset: must be one that exists; got '9b'"),
        (['stages=["trian"]'], r"^stages: .* got 'trian'; did you mean train\?$"),
        (["limit_seconds.trian=3"], r"^[a-z_]+: .* got 'trian'; did you mean train"),
        (["limit_seconds.train=-5"], r"^limit_seconds\.train: must be 0 or above; got -5$"),
        (["name='a\\b'"], r"^name: must be the name of a folder under runs/; got 'a\\\\b'$"),
        (["train.steps=5 # steps"], r"^train\.steps: must be a valid integer; got '5 # steps'$"),
        (['name="../x"'], r"^name: must be the name of a folder under runs/; got '\.\./x'$"),
        (["tokenizer.vocab_size=5000"], r"^tokenizer\.vocab_size: must fit the model's 4096; got 5000$"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_its_dotted_name(overrides: list[str], message: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(str(file), overrides)
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^recipe: must be a \.toml file or one of the package's; got 'labtop'; did you mean laptop\?$",
    ):
        read_recipe("labtop")
    missing = tmp_path / "none.toml"
    with pytest.raises(ConfigError, match=rf"^{missing}: must be a readable file; got No such file"):
        read_recipe(str(missing))
    missing.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=rf"^{missing}: must be UTF-8 text"):
        read_recipe(str(missing))
    missing.write_text("a = = 3")
    with pytest.raises(ConfigError, match=rf"^{missing}: must be TOML; got"):
        read_recipe(str(missing))
