"""Errors that this package raises for a caller's mistake.

    MedusaError
    ├── ConfigError        a setting or sampling parameter is out of range
    ├── CheckpointError    model or head files are missing, unexpected or misshapen
    ├── TokenizerError     no usable tokenizer or chat template, or it refuses the messages
    ├── TreeError          a draft tree is malformed, too deep or too wide
    ├── DataError          a training or prompt file cannot be used
    └── RequestError       this one request cannot be served; the engine goes on
        └── CapacityError  no free slot: wait for a running request to end

Messages say what to change. A broken invariant of our own is an `AssertionError`, not one of these.
"""


class MedusaError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(MedusaError):
    """A setting or parameter is out of its range; the message names it."""


class CheckpointError(MedusaError):
    """Model or head files are missing, unexpected or misshapen; the message names them."""


class TokenizerError(MedusaError):
    """No usable tokenizer or chat template, or the template refuses these messages."""


class TreeError(MedusaError):
    """A draft tree is malformed, deeper than the heads or wider than their candidates."""


class DataError(MedusaError):
    """A training or prompt file cannot be used; the message names file and line."""


class RequestError(MedusaError):
    """One request cannot be served; others are unaffected."""


class CapacityError(RequestError):
    """Every slot is taken."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
