"""The console script `medusa`: the core's commands, and `serve`."""

import logging

from medusa_core.cli import app, run
from server.flags import settings_flags
from server.log import configure_logging
from server.settings import Settings, load_settings, unknown_variables

logger = logging.getLogger(__name__)


@app.command(rich_help_panel="Use a model")
@settings_flags(Settings)
def serve(**flags: str | None) -> None:
    """Serve a model over the OpenAI API. Flags override MEDUSA_… environment variables."""
    settings = load_settings(flags)
    configure_logging(settings.log_level)
    for name in unknown_variables():
        logger.warning("%s is set, but there is no such setting", name)
    # Only here: the other commands should not load a web framework.
    from server.listener import serve as run_server

    run_server(settings)


def main() -> None:
    """Entry point; errors of the user's making end in one line and exit code 1."""
    run(app)
