"""Dataclass fields that a user can set: help text, limits, and what the command line calls them."""

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from medusa_core.errors import ConfigError

_KEY = "option"  # of a field's metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a number must be: `least` <= number <= `most`, `above` < number < `below`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def allow(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        texts = {"at least": self.least, "at most": self.most, "above": self.above, "below": self.below}
        return " and ".join(f"{text} {value:g}" for text, value in texts.items() if math.isfinite(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What a command line needs to know of a setting beside its name, type and default.

    `panel`: heading in the help. `env`: environment variable. `shown`: what the help says instead of the
    default; False shows none. `flag`: instead of --field-name. `path`: what an existing path must be.
    `metavar`: word for the value instead of the type's.
    """

    help: str
    panel: str | None = None
    env: str | None = None
    shown: str | bool = True
    flag: str | None = None
    path: Literal["file", "folder"] | None = None
    metavar: str | None = None
    limits: Limits = Limits()


def option(
    text: str,
    panel: str | None = None,
    *,
    default: Any = MISSING,
    env: str | None = None,
    shown: str | bool = True,
    flag: str | None = None,
    path: Literal["file", "folder"] | None = None,
    **limits: float,
) -> Any:
    """A dataclass field that is an option too; `limits` are members of `Limits`."""
    described = Option(
        help=text, panel=panel, env=env, shown=shown, flag=flag, path=path, limits=Limits(**limits)
    )
    return field(default=default, metadata={_KEY: described})


def option_of(spec: Field[Any]) -> Option | None:
    """The field's option; None if only code sets it."""
    return spec.metadata.get(_KEY)


def check_limits(settings: Any) -> None:
    """Raise `ConfigError` for the first field whose number is beyond its option's limits; None passes."""
    for spec in fields(settings):
        described, value = option_of(spec), getattr(settings, spec.name)
        if described is None or not isinstance(value, int | float):
            continue
        if not described.limits.allow(value):
            raise ConfigError(f"{spec.name} must be {described.limits}, not {value}")
