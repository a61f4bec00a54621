"""Typer options from the fields of settings classes, so that each option is declared once. No torch here."""

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from medusa_core.option_field import Option, option_of


@dataclass(frozen=True, slots=True)
class OptionGroup:
    """Options that belong together, and what their values are made into."""

    parameters: tuple[Parameter, ...]
    build: Callable[..., Any]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A typer command out of a function some of whose parameters are whole groups of options.

    A group is a parameter whose type is a dataclass of `option` fields, or one annotated with an
    `OptionGroup`. Its options stand in its place, and the function gets the object built from them.
    """
    hints = get_type_hints(command, include_extras=True)
    hints.pop("return", None)
    groups = {name: group for name, hint in hints.items() if (group := _group_of(hint)) is not None}
    parameters: list[Parameter] = []
    for name, hint in hints.items():
        own = Parameter(name, Parameter.KEYWORD_ONLY, annotation=hint)
        parameters += groups[name].parameters if name in groups else [own]

    @wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group.build(**{p.name: values.pop(p.name) for p in group.parameters})
        command(**values)

    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def dataclass_options(kind: type, panel: str | None = None) -> OptionGroup:
    """The group of a dataclass: an option for each field declared as one, or for those of one panel."""
    hints = get_type_hints(kind)
    parameters = [
        parameter(spec.name, hints[spec.name], described, spec.default)
        for spec in fields(kind)
        if (described := option_of(spec)) is not None and panel in (None, described.panel)
    ]

    def build(**values: Any) -> Any:
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    return OptionGroup(tuple(parameters), build)


def parameter(name: str, kind: Any, described: Option, default: Any = MISSING) -> Parameter:
    """The parameter that typer makes one option of; without a default it is required."""
    flag = described.flag or f"--{name.replace('_', '-')}"
    declared = typer.Option(
        # A plain switch has no --no-... form; one that may be None has, to tell "off" from "not given".
        *([flag] if described.flag or kind is bool else []),
        help=escape(described.help),
        rich_help_panel=described.panel,
        envvar=described.env,
        show_default=described.shown,
        metavar=described.metavar,
        # What typer has no word for (above, below) the settings refuse all the same.
        min=described.least if math.isfinite(described.least) else None,
        max=described.most if math.isfinite(described.most) else None,
        dir_okay=described.path != "file",
        file_okay=described.path != "folder",
    )
    return Parameter(
        name,
        Parameter.KEYWORD_ONLY,
        default=Parameter.empty if default is MISSING else list(default) if default == () else default,
        annotation=Annotated[list[str] if get_origin(kind) is tuple else kind, declared],
    )


def _group_of(hint: Any) -> OptionGroup | None:
    declared = next((extra for extra in get_args(hint)[1:] if isinstance(extra, OptionGroup)), None)
    if declared is None and isinstance(hint, type) and is_dataclass(hint):
        return dataclass_options(hint)
    return declared
