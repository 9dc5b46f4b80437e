"""Pattern strings: one letter a layer, as the published configs write them (arXiv:2504.03624, section 2.1)."""

from nemotron_h.errors import ConfigError, UnsupportedError

MAMBA, ATTENTION, MLP = "M", "*", "-"
NAMES = {MAMBA: "Mamba-2", ATTENTION: "attention", MLP: "FFN"}


def read_pattern(pattern: str) -> str:
    """The pattern itself, once every letter is one we know.

    Raises: ConfigError for an unknown letter, with its place; UnsupportedError for a kind of layer that exists and is
    not implemented.
    """
    if not pattern:
        raise ConfigError("pattern: must hold at least one layer; got an empty string")
    for index, letter in enumerate(pattern):
        if letter == "E":
            raise UnsupportedError(
                "pattern: mixture-of-experts models (Nemotron 3 Nano, Super, Ultra) are not supported; "
                f"got 'E' at layer {index}"
            )
        if letter not in NAMES:
            known = ", ".join(f"{key!r} {name}" for key, name in NAMES.items())
            raise ConfigError(f"pattern: must be made of {known}; got {letter!r} at layer {index}")
    return pattern
