"""Dataclass fields that a user can set: help text, limits, and what the command line calls them."""

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from medusa_core.errors import ConfigError

_KEY = "option"  # of a field's metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What a command line needs to know of a setting beside its name, type and default.

    `panel`: heading in the help. `env`: environment variable. `shown`: what the help says instead of the
    default; False shows none. `flag`: instead of --field-name. `path`: what an existing path must be.
    `metavar`: word for the value instead of the type's. Of a number: `least` <= number <= `most`, `above` <
    number < `below`.
    """

    help: str
    panel: str | None = None
    env: str | None = None
    shown: str | bool = True
    flag: str | None = None
    path: Literal["file", "folder"] | None = None
    metavar: str | None = None
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def allows(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    @property
    def limits(self) -> str:
        texts = {"at least": self.least, "at most": self.most, "above": self.above, "below": self.below}
        return " and ".join(f"{text} {value:g}" for text, value in texts.items() if math.isfinite(value))


def option(text: str, panel: str | None = None, *, default: Any = MISSING, **described: Any) -> Any:
    """A dataclass field that is an option too; `described` are further members of `Option`."""
    return field(default=default, metadata={_KEY: Option(help=text, panel=panel, **described)})


def option_of(spec: Field[Any]) -> Option | None:
    """The field's option; None if only code sets it."""
    return spec.metadata.get(_KEY)


def check_limits(settings: Any) -> None:
    """Raise `ConfigError` for the first field whose number is beyond its option's limits; None passes."""
    for spec in fields(settings):
        described, value = option_of(spec), getattr(settings, spec.name)
        if described is not None and isinstance(value, int | float) and not described.allows(value):
            raise ConfigError(f"{spec.name} must be {described.limits}, not {value}")
