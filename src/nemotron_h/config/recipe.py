"""A recipe: the stages of a run, in order, and how each is set. Read from TOML, with dotted overrides."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from nemotron_h.config.data import CorpusConfig
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.presets import preset
from nemotron_h.config.sampling import Sampling
from nemotron_h.config.settings import Lenient, from_mapping, nearest, settings
from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.config.train import TrainConfig
from nemotron_h.errors import ConfigError

STAGES = ("corpus", "tokenizer", "shards", "baselines", "train", "samples")


@settings
class SamplesConfig:
    """What the trained model is asked to write."""

    prompts: Annotated[tuple[str, ...], Lenient] = ("def",)
    max_tokens: int = 120
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise ConfigError(f"prompts: must be one or more, each once; got {list(self.prompts)}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens: must be 1 or above; got {self.max_tokens}")
        self.sampling(0)

    def sampling(self, number: int) -> Sampling:
        """How the tokens after prompt `number` are drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed + number)


@settings
class ModelChoice:
    """Which model is trained."""

    preset: str


@settings
class Recipe:
    """The settings of a run."""

    name: str  # of its folder under runs/
    stages: Annotated[tuple[str, ...], Lenient] = STAGES
    limit_seconds: dict[str, int] = field(default_factory=dict)  # what a stage takes at most, as a rule; stops nothing
    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig
    model: ModelChoice
    train: TrainConfig
    samples: SamplesConfig = SamplesConfig()

    def __post_init__(self) -> None:
        for name, stages in (("stages", self.stages), ("limit_seconds", self.limit_seconds)):
            for stage in stages:
                if stage not in STAGES:
                    raise ConfigError(f"{name}: must name known stages; got {stage!r}; {nearest(stage, list(STAGES))}")
        for stage, limit in self.limit_seconds.items():
            if limit < 0:
                raise ConfigError(f"limit_seconds.{stage}: must be 0 or above; got {limit}")
        if not self.stages or list(self.stages) != [stage for stage in STAGES if stage in self.stages]:
            raise ConfigError(f"stages: must be some of {', '.join(STAGES)}, in that order; got {list(self.stages)}")
        if not self.name or self.name.startswith(".") or set(self.name) & set("/\\"):
            raise ConfigError(f"name: must be the name of a folder under runs/; got {self.name!r}")
        vocab = self.model_config.vocab_size
        if self.tokenizer.vocab_size > vocab:
            raise ConfigError(f"tokenizer.vocab_size: must fit the model's {vocab}; got {self.tokenizer.vocab_size}")

    @property
    def model_config(self) -> ModelConfig:
        return preset(self.model.preset)


def read_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name (a file of the package, without .toml) or path; overrides such as `train.steps=200`."""
    try:
        values = tomllib.loads(recipe_text(name))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: must be TOML; got {error}") from None
    values.setdefault("name", Path(name).stem)
    return from_mapping(Recipe, overridden(values, overrides))


def recipe_text(name: str) -> str:
    """The file's text. Raises: ConfigError where there is no such recipe, or it is not UTF-8."""
    if name.endswith(".toml"):
        try:
            return Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{name}: must be a readable file; got {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{name}: must be UTF-8 text; got other bytes") from None
    folder = resources.files("nemotron_h") / "recipes"
    known = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
    if name not in known:
        raise ConfigError(f"recipe: must be a .toml file or one of the package's; got {name!r}; {nearest(name, known)}")
    return (folder / f"{name}.toml").read_text(encoding="utf-8")


def overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values with each `table.key=value` put in; value is TOML, or else a plain string."""
    result = dict(values)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"override: must read table.key=value; got {override!r}")
        *path, key = dotted.split(".")
        table = result
        for part in path:
            inner = table.get(part, {})
            if not isinstance(inner, Mapping):
                raise ConfigError(f"{dotted}: must name a setting in a table; got {part}, which is a value")
            table[part] = dict(inner)
            table = table[part]
        table[key] = toml_value(text)
    return result


def toml_value(text: str) -> Any:
    """The value that text writes in TOML; text itself where it writes none, or more than one value."""
    try:
        tomllib.loads(f"value = [{text.strip()}]")  # refuses a second setting; a comment swallows the bracket
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
