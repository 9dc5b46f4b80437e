"""generation_config.json: which tokens end a text, and how tokens are drawn unless the caller says otherwise.

Where the file is silent, config.json is asked: older files keep these keys there. A default that we cannot honour is
refused when it would be used, not when the checkpoint is read; keys of other programs are carried as they are.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_h.config.keys import CONFIG_FILE, Keys, read_object, short
from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import CheckpointError, ConfigError, UnsupportedError

GENERATION_FILE = "generation_config.json"
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
DRAWS = ("do_sample", "top_k", *NUMBERS)
OWN = ("eos_token_id", *DRAWS)
WRITERS = ("transformers_version", "_from_model_config", "_commit_hash")  # about the file, not about generating

# Keys that change which token comes next, and the values that change nothing (null never does).
ALWAYS: dict[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "dola_layers": (),
    "stop_strings": ([],),
    "token_healing": (False,),
}
WHEN_DRAWN: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
STEERING = (*DRAWS, *ALWAYS, *WHEN_DRAWN)


@dataclass(frozen=True)
class Generation:
    """What a checkpoint says of generating. None: it does not say."""

    end_ids: tuple[int, ...] = ()  # empty: not said here
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    others: Mapping[str, Any] = field(default_factory=dict)  # the file's other keys, as they are

    def sampling(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int = 0,
    ) -> Sampling:
        """How tokens are drawn: as the caller says; where that is None, as the checkpoint does; else the likeliest.

        Without do_sample the checkpoint's temperature does not count: that is how its own program reads it. Its
        penalties count all the same.
        Raises: UnsupportedError where the checkpoint's defaults steer by what we do not do; ConfigError.
        """
        default = (1.0 if self.temperature is None else self.temperature) if self.do_sample else 0.0
        drawn_at = default if temperature is None else temperature
        for key, neutral in (ALWAYS | (WHEN_DRAWN if drawn_at else {})).items():
            value = self.others.get(key)
            if value is not None and value not in neutral:
                raise UnsupportedError(
                    f"{GENERATION_FILE}: {key} is not supported; got {short(value)}; draw without the checkpoint's "
                    "defaults: --ignore-defaults, or sampling=Sampling(...)"
                )
        said: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
        }
        values = {key: getattr(self, key) if value is None else value for key, value in said.items()}
        values |= {"temperature": drawn_at, "seed": seed}
        try:
            return Sampling(**{key: value for key, value in values.items() if value is not None})
        except ConfigError as error:
            own = said.get(str(error).partition(":")[0], seed) is None
            raise ConfigError(f"{GENERATION_FILE}: {error}" if own else str(error)) from None


def read_generation(folder: Path) -> Generation:
    """What the files of a checkpoint folder say. Raises: CheckpointError or ConfigError naming the file."""
    path = folder / GENERATION_FILE
    values = read_object(path) if path.exists() else {}
    older = read_object(folder / CONFIG_FILE)
    values = {key: older[key] for key in STEERING if key in older} | values
    keys = Keys(values)
    try:
        return Generation(
            end_ids=keys.integers("eos_token_id"),
            do_sample=keys.boolean("do_sample", default=False),
            top_k=keys.integer("top_k") if "top_k" in keys else None,
            **{key: keys.number(key) for key in NUMBERS if key in keys},
            others={key: value for key, value in values.items() if key not in (*OWN, *WRITERS)},
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def write_generation(generation: Generation, path: Path) -> None:
    """Write generation_config.json, as transformers and vLLM read it."""
    values: dict[str, Any] = dict(generation.others)
    if generation.end_ids:
        values["eos_token_id"] = list(generation.end_ids)
    if generation.do_sample:
        values["do_sample"] = True
    values |= {key: value for key in DRAWS[1:] if (value := getattr(generation, key)) is not None}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
