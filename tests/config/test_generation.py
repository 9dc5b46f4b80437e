"""How tokens are drawn: the caller says, else the checkpoint, else the likeliest."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.config.generation import GENERATION_FILE, Generation, read_generation, write_generation
from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import CheckpointError, ConfigError, UnsupportedError


def read(folder: Path, values: Any, older: dict[str, Any] | None = None) -> Generation:
    (folder / "config.json").write_text(json.dumps(older or {}))
    if values is not None:
        (folder / GENERATION_FILE).write_text(json.dumps(values))
    return read_generation(folder)


# The keys that such a file has.
VALUES = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [2, 11, 12],
    "pad_token_id": 0,
    "temperature": 0.6,
    "top_p": 0.95,
    "transformers_version": "4.48.3",
}


def test_the_familys_file(tmp_path: Path) -> None:
    generation = read(tmp_path, VALUES)
    assert generation.end_ids == (2, 11, 12)
    assert generation.sampling(seed=3) == Sampling(temperature=0.6, top_p=0.95, seed=3)
    write_generation(generation, tmp_path / GENERATION_FILE)
    written = json.loads((tmp_path / GENERATION_FILE).read_text())
    writers = ("_from_model_config", "transformers_version")
    assert written == {key: value for key, value in VALUES.items() if key not in writers}
    assert read_generation(tmp_path) == generation


def test_what_the_caller_says_wins(tmp_path: Path) -> None:
    generation = read(tmp_path, VALUES | {"top_k": 40})
    assert generation.sampling(temperature=0.0).temperature == 0
    assert generation.sampling(top_k=0, top_p=1.0) == Sampling(temperature=0.6)
    assert generation.sampling(temperature=1.5) == Sampling(temperature=1.5, top_p=0.95, top_k=40)


@pytest.mark.parametrize("silent", [None, {}, {"temperature": 0.6}, {"do_sample": False, "temperature": 0.6}])
def test_without_do_sample_the_likeliest_is_taken(silent: dict[str, Any] | None, tmp_path: Path) -> None:
    assert read(tmp_path, silent).sampling().temperature == 0


def test_do_sample_alone_draws_from_the_model_as_it_is(tmp_path: Path) -> None:
    assert read(tmp_path, {"do_sample": True}).sampling() == Sampling(temperature=1.0)


def test_config_json_is_asked_where_the_file_is_silent(tmp_path: Path) -> None:
    older = {"do_sample": True, "temperature": 0.9, "top_k": 7, "repetition_penalty": 1.1, "eos_token_id": 5}
    generation = read(
        tmp_path, {"temperature": 0.5, "repetition_penalty": 1.0, "num_beams": None}, older | {"min_p": 0.1}
    )
    assert generation.sampling() == Sampling(temperature=0.5, top_k=7, min_p=0.1)
    assert generation.end_ids == ()  # config.json's own are the model's: asked after these


OPTIONS = {
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.25,
}


@pytest.mark.parametrize(("name", "value"), OPTIONS.items())
def test_each_default_is_honoured_kept_and_overruled(name: str, value: float, tmp_path: Path) -> None:
    generation = read(tmp_path, {"do_sample": True, "temperature": 0.6, name: value})
    assert generation.sampling(seed=3) == Sampling(temperature=0.6, seed=3, **{name: value})
    neutral = getattr(Sampling(), name)
    assert generation.sampling(**{name: neutral}) == Sampling(temperature=0.6)
    assert Generation().sampling(**{name: value}) == Sampling(**{name: value})
    write_generation(generation, tmp_path / GENERATION_FILE)
    assert read_generation(tmp_path) == generation
    assert json.loads((tmp_path / GENERATION_FILE).read_text())[name] == value


def test_penalties_count_where_nothing_is_drawn_too(tmp_path: Path) -> None:
    generation = read(tmp_path, {"repetition_penalty": 1.2})
    assert generation.sampling() == Sampling(repetition_penalty=1.2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder_repetition_penalty", 1.1),
        ("no_repeat_ngram_size", 3),
        ("num_beams", 4),
        ("typical_p", 0.9),
        ("bad_words_ids", [[5]]),
        ("suppress_tokens", [3]),
        ("forced_eos_token_id", 2),
        ("stop_strings", ["x"]),
        ("min_new_tokens", 5),
        ("watermarking_config", {"bias": 2.0}),
    ],
)
def test_a_default_we_cannot_honour_is_refused_when_it_is_used(key: str, value: Any, tmp_path: Path) -> None:
    generation = read(tmp_path, VALUES | {key: value})  # reading is fine
    with pytest.raises(UnsupportedError) as caught:
        generation.sampling()
    assert str(caught.value).startswith(f"{GENERATION_FILE}: {key} is not supported; got {value!r}; draw without")
    assert "--ignore-defaults" in str(caught.value)
    write_generation(generation, tmp_path / GENERATION_FILE)
    assert json.loads((tmp_path / GENERATION_FILE).read_text())[key] == value  # and is not lost on the way


def test_what_steers_draws_alone_does_not_matter_without_them(tmp_path: Path) -> None:
    generation = read(tmp_path, VALUES | {"typical_p": 0.9})
    assert generation.sampling(temperature=0.0).temperature == 0


def test_values_that_change_nothing_pass(tmp_path: Path) -> None:
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "min_p": 0.0, "typical_p": 1.0, "suppress_tokens": None}
    others = {"use_cache": True, "max_length": 20, "min_length": 0, "bad_words_ids": None, "stop_strings": []}
    assert read(tmp_path, VALUES | neutral | others).sampling() == Sampling(temperature=0.6, top_p=0.95)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("eos_token_id", "</s>", "must be an integer; got '</s>'"),
        ("eos_token_id", [2, 3.5], "must be an integer; got 3.5"),
        ("eos_token_id", [True], "must be an integer; got True"),
        ("do_sample", 1, "must be true or false; got 1"),
        ("temperature", "hot", "must be a number; got 'hot'"),
        ("top_k", 0.5, "must be an integer; got 0.5"),
        ("top_p", [1], "must be a number; got [1]"),
        ("min_p", "low", "must be a number; got 'low'"),
        ("repetition_penalty", True, "must be a number; got True"),
        ("presence_penalty", {}, "must be a number; got {}"),
        ("frequency_penalty", [], "must be a number; got []"),
    ],
)
def test_a_value_of_the_wrong_kind_is_damage(key: str, value: Any, rule: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, {key: value})
    assert str(caught.value) == f"{tmp_path / GENERATION_FILE}: {key}: {rule}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("min_p", 1.0), ("repetition_penalty", 0.0), ("presence_penalty", 3.0)],
)
def test_whose_value_is_out_of_range_is_said(name: str, value: float, tmp_path: Path) -> None:
    generation = read(tmp_path, {"do_sample": True, name: value})
    with pytest.raises(ConfigError, match=rf"^generation_config\.json: {name}: must .*; got {value}$"):
        generation.sampling()
    with pytest.raises(ConfigError, match=rf"^{name}: must .*; got {value}$"):
        generation.sampling(**{name: value})


def test_a_value_out_of_range_is_refused_when_it_is_used(tmp_path: Path) -> None:
    generation = read(tmp_path, VALUES | {"top_p": 1.5})
    with pytest.raises(
        ConfigError, match=r"^generation_config\.json: top_p: must lie above 0 and not above 1; got 1\.5$"
    ):
        generation.sampling()
    with pytest.raises(ConfigError, match=r"^top_p: must lie above 0 and not above 1; got 2\.0$"):
        generation.sampling(top_p=2.0)
    assert generation.sampling(top_p=0.5).top_p == 0.5
