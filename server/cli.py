"""The console script `medusa`: the core's commands, and `serve`."""

import logging

import typer

from medusa_core.cli.main import app, run
from medusa_core.errors import MedusaError
from server.flags import settings_flags
from server.observability.logging import configure_logging
from server.settings import Settings, load_settings, unknown_variables

logger = logging.getLogger(__name__)


@app.command(rich_help_panel="Use a model")
@settings_flags(Settings)
def serve(**flags: str | None) -> None:
    """Serve a model over the OpenAI API. Flags override MEDUSA_… environment variables."""
    settings = load_settings(flags)
    configure_logging(settings.log_level, settings.log_format)
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
