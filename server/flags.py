"""Command-line flags made from settings, so that the two never differ."""

import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from server.settings import SHOWN_DEFAULT


def settings_flags(settings: type[BaseSettings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator for a typer command that takes `**flags`: one `--flag` for each field of `settings`.

    Flags are text or None; the settings class does all checking, so that a flag and its variable fail alike.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=_annotation(settings, name, field),
            )
            for name, field in settings.model_fields.items()
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _annotation(settings: type[BaseSettings], name: str, field: FieldInfo) -> Any:
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        envvar=f"{settings.model_config.get('env_prefix', '')}{name}".upper(),
        help=field.description,
        metavar=_metavar(field.annotation),
        show_default=_shown_default(field),
    )
    return Annotated[str | None, option]


def _shown_default(field: FieldInfo) -> str | bool:
    if isinstance(field.json_schema_extra, dict) and SHOWN_DEFAULT in field.json_schema_extra:
        return str(field.json_schema_extra[SHOWN_DEFAULT])
    return False if field.default is None else str(field.default)


def _metavar(annotation: Any) -> str:
    """A word for the type: the first of a union, the members of a literal or of an enum of words."""
    kinds = get_args(annotation) or (annotation,)
    if isinstance(kinds[0], type) and issubclass(kinds[0], StrEnum):
        kinds = tuple(kinds[0])
    if all(isinstance(kind, str) for kind in kinds):
        return "|".join(kinds)
    kind = getattr(kinds[0], "__origin__", kinds[0])  # of Annotated
    return {int: "INTEGER", float: "NUMBER", bool: "BOOLEAN"}.get(kind, "TEXT")
