"""One log format for the API process and its workers, on stderr."""

import logging.config


def configure_logging(level: str) -> None:
    """Send every logger, uvicorn's included, through one handler. `level` is a name such as "info"."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"format": "%(asctime)s %(levelname)-7s %(name)s: %(message)s"}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
            "root": {"level": level.upper(), "handlers": ["stderr"]},
            # sse-starlette logs every chunk at debug level, text included.
            "loggers": {"sse_starlette": {"level": "INFO"}},
        }
    )
