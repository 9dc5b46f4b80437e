"""Every error a caller is meant to read. Grammar of a message: *what: rule; got value; do this.*"""


class NemotronError(Exception):
    """The root of the tree: one line that a user can act on."""


class ConfigError(NemotronError):
    """A setting breaks a rule, or is unknown."""


class ShapeError(NemotronError):
    """A tensor's shape or dtype is not the one the operation is defined for."""


class UnsupportedError(NemotronError):
    """Asked for by name, and not something we do."""


class CheckpointError(NemotronError):
    """A checkpoint folder is incomplete, damaged, or of another model."""


class RequestError(NemotronError):
    """A request to generate holds a value we cannot honour."""


class CapacityError(NemotronError):
    """Memory or disk is too small; the message has both numbers."""


class DataError(NemotronError):
    """A document, a shard or a text file is missing, damaged or not what its header says."""


class MissingExtraError(NemotronError):
    """A package of an extra is not installed; the message says which extra has it."""
