"""Settings of draws: what they hold, what they refuse, and that JSON keeps them."""

import json
import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from nemotron_h.config.sampling import Sampling
from nemotron_h.config.settings import from_mapping, to_mapping
from nemotron_h.errors import ConfigError


def test_the_defaults_change_nothing() -> None:
    assert to_mapping(Sampling()) == {
        "logit_bias": {},
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 0,
    }


@pytest.mark.parametrize(
    "given",
    [{7: 1.5, 3: -2}, {"7": 1.5, "3": -2}, {3: -2.0, "7": 1.5}, ((7, 1.5), (3, -2.0)), [["3", -2], [7, 1.5]]],
)
def test_a_bias_is_the_same_however_it_is_written(given: Any) -> None:
    sampling = Sampling(logit_bias=given)
    assert sampling.logit_bias == ((3, -2.0), (7, 1.5))
    assert all(type(bias) is float for _, bias in sampling.logit_bias)
    assert sampling == Sampling(logit_bias={3: -2.0, 7: 1.5})
    assert hash(sampling) == hash(Sampling(logit_bias={3: -2.0, 7: 1.5}))


def test_settings_survive_json_and_replace() -> None:
    sampling = Sampling(
        temperature=0.5, min_p=0.1, presence_penalty=-2, logit_bias={12: 0.25, 3: -100.0}, seed=2**63 - 1
    )
    assert from_mapping(Sampling, json.loads(json.dumps(to_mapping(sampling)))) == sampling
    assert json.loads(json.dumps(to_mapping(sampling)))["logit_bias"] == {"3": -100.0, "12": 0.25}
    assert replace(sampling, seed=4).logit_bias == sampling.logit_bias


def test_nothing_changes_once_built() -> None:
    mine = {3: 1.0}
    sampling = Sampling(logit_bias=mine)
    mine[3] = 5.0
    assert sampling.logit_bias == ((3, 1.0),)
    with pytest.raises(FrozenInstanceError):
        sampling.logit_bias = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        sampling.logit_bias[0] = (3, 5.0)  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("min_p", 0),
        ("min_p", 0.999),
        ("repetition_penalty", 1e-3),
        ("presence_penalty", -2),
        ("frequency_penalty", 2.0),
        ("seed", 2**63 - 1),
        ("logit_bias", {0: -1e30, 2**31 - 1: 3}),
    ],
)
def test_the_ends_of_each_range_are_taken(name: str, value: Any) -> None:
    Sampling(**{name: value})


@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        ("temperature", [-0.5, math.nan, math.inf], "must be 0 or above"),
        ("temperature", ["1", True], "must be a valid number"),
        ("top_k", [-1], r"must be 0 \(all\) or above"),
        ("top_k", [1.5, "3", True], "must be a valid integer"),
        ("top_p", [0.0, 1.1, math.nan], "must lie above 0 and not above 1"),
        ("min_p", [-0.1, 1.0, math.nan], "must be 0 or above, and below 1"),
        ("repetition_penalty", [0.0, -1.0, math.nan, math.inf], "must be above 0"),
        ("presence_penalty", [-2.1, 2.1, math.nan], r"must lie in -2\.\.2"),
        ("frequency_penalty", [-2.1, 2.1, math.inf], r"must lie in -2\.\.2"),
        ("seed", [-1, 2**63], r"must lie in 0\.\.2\^63-1"),
        ("logit_bias", [3, "3", None, [3], [(1, 2, 3)], {1}], "must map token ids to numbers"),
        (
            "logit_bias",
            [{-1: 0.0}, {"-1": 0.0}, {"x": 0.0}, {1.0: 0.0}, {True: 0.0}],
            "must name tokens by ids of 0 or",
        ),
        ("logit_bias", [{"": 0.0}, {"٣": 0.0}, {2**31: 0.0}, {"9" * 5000: 0.0}], "must name tokens by ids of 0 or"),
        ("logit_bias", [{3: math.nan}, {3: math.inf}, {3: "1"}, {3: True}, {3: 10**400}], "must be finite numbers"),
        ("logit_bias", [{3: 1.0, "3": 1.0}, [(3, 1.0), (3, 2.0)]], "must name each token once"),
        ("top_n", [3], "unknown setting; did you mean top_p"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, values: list[Any], rule: str) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{name}: {rule}") as caught:
            Sampling(**{name: value})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300
        assert "; got " in str(caught.value) or "unknown" in rule
