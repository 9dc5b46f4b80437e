import pytest

from nemotron_h.config.data import CorpusConfig
from nemotron_h.errors import ConfigError


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"suffixes": ()}, "suffixes"),
        ({"suffixes": ("py",)}, "suffixes: must be endings"),
        ({"max_document_bytes": 0}, "max_document_bytes: must be positive; got 0"),
        ({"validation_fraction": 1.0}, "validation_fraction: must lie between 0 and 1"),
        ({"near_copy_fraction": 0.0}, "near_copy_fraction: must lie between 0 and 1"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CorpusConfig(**setting)  # type: ignore[arg-type]
