"""One log format for the API process and its workers, on stderr."""

import logging
import logging.config

PROBES = ('"GET /health ', '"GET /ready ', '"GET /metrics ')


def configure_logging(level: str) -> None:
    """Send every logger, uvicorn's included, through one handler. `level` is a name such as "info"."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"format": "%(asctime)s %(levelname)-7s %(name)s: %(message)s"}},
            "filters": {"no_probes": {"()": lambda: is_worth_logging}},
            "handlers": {
                "stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["no_probes"]}
            },
            "root": {"level": level.upper(), "handlers": ["stderr"]},
            "loggers": {
                # At info it tells its own start and end, which we do better.
                "uvicorn.error": {"level": "DEBUG" if level == "debug" else "WARNING"},
                # At debug it logs every chunk, text included.
                "sse_starlette": {"level": "INFO"},
            },
        }
    )


def is_worth_logging(record: logging.LogRecord) -> bool:
    """Leave out accesses that probes make every few seconds, unless one went wrong."""
    if record.name != "uvicorn.access":
        return True
    line = record.getMessage()
    return not (any(probe in line for probe in PROBES) and line.endswith(" 200"))
