"""The console script `medusa`: the core's commands, and `serve`."""

import logging
import os
from enum import StrEnum
from inspect import Parameter
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from medusa_core.cli.main import app, run
from medusa_core.cli.options import OptionGroup, parameter, with_options
from medusa_core.errors import MedusaError
from medusa_core.option_field import Option
from server.observability.logging import configure_logging
from server.settings import PREFIX, SHOWN_DEFAULT, Settings, load_settings, unknown_variables

logger = logging.getLogger(__name__)


def settings_options() -> OptionGroup:
    """An option for each field of `Settings`.

    All are text or None: the settings class does all checking, so that a flag and its variable fail alike.
    """
    parameters = tuple(_parameter(name, field) for name, field in Settings.model_fields.items())
    return OptionGroup(parameters, lambda **flags: load_settings(flags))


def _parameter(name: str, field: FieldInfo) -> Parameter:
    described = Option(
        help=field.description or "",
        env=f"{PREFIX}{name}".upper(),
        shown=_shown_default(field),
        flag=f"--{name.replace('_', '-')}",
        metavar=_metavar(field.annotation),
    )
    return parameter(name, str | None, described, None)


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


@app.command(rich_help_panel="Use a model")
@with_options
def serve(settings: Annotated[Settings, settings_options()]) -> None:
    """Serve a model over the OpenAI API. Flags override MEDUSA_… environment variables."""
    configure_logging(settings.log_level, settings.log_format)
    if settings.cache_dir is not None:
        os.environ[f"{PREFIX}CACHE_DIR"] = str(settings.cache_dir)  # where workers look, told by flag or not
    for name in unknown_variables():
        logger.warning("%s is set, but there is no such setting", name)
    # Only here: the other commands should not load a web framework.
    from server.serve import serve as run_server

    try:
        run_server(settings)
    except MedusaError as error:
        if settings.log_format == "text":
            raise
        logger.critical("%s", error)
        raise typer.Exit(1) from error


def main() -> None:
    """Entry point; errors of the user's making end in one line and exit code 1."""
    run(app)
