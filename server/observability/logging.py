"""Logs of all processes on stderr: one line a record as text, or one JSON object.

Lines about a request carry two ids: `request_id`, the client's own or made up for it (`x-request-id`), and
`completion_id` (`chatcmpl-…`), which workers know it by.
"""

import logging
import os
import sys
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["text", "json"]

REQUEST_ID = "request_id"
COMPLETION_ID = "completion_id"

# The ids of the request that the current task serves. The mapping is shared: what is learned later is in it.
request_ids: ContextVar[Mapping[str, str] | None] = ContextVar("request_ids", default=None)

LIBRARIES = {
    # At info it tells its own start and end, which we do better.
    "uvicorn.error": "WARNING",
    # At debug it logs every chunk, text included.
    "sse_starlette": "INFO",
    # They log each request they make.
    "httpx": "WARNING",
    "httpcore": "WARNING",
    # A collector that is gone is one line a batch, not one for each attempt.
    "opentelemetry": "ERROR",
}


def configure_logging(
    level: str,
    log_format: LogFormat = "text",
    *,
    worker: int | None = None,
    client_ids: Mapping[str, str] | None = None,
) -> None:
    """Send every logger, and what would end a thread or the process, through one handler.

    `level` is a name such as "info", `worker` the generation of a worker process, and `client_ids` tells the
    request id of a completion id.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RequestIds(client_ids or {}))
    handler.setFormatter(_json_formatter(worker) if log_format == "json" else TextFormatter(worker))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name, least in LIBRARIES.items():
        logging.getLogger(name).setLevel("DEBUG" if level == "debug" and name == "uvicorn.error" else least)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    if log_format == "json":
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars are no JSON


def adopt_libraries() -> None:
    """Take away the handlers that libraries gave themselves when they were imported."""
    for name in ("transformers", "huggingface_hub"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True


class RequestIds(logging.Filter):
    """Adds the ids of the request a record is about: its own first, else those of the current task."""

    def __init__(self, client_ids: Mapping[str, str]) -> None:
        super().__init__()
        self._client_ids = client_ids

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, COMPLETION_ID):
            record.__dict__.update(
                {key: value for key, value in (request_ids.get() or {}).items() if key not in record.__dict__}
            )
        elif not hasattr(record, REQUEST_ID):
            client_id = self._client_ids.get(getattr(record, COMPLETION_ID))
            if client_id:
                setattr(record, REQUEST_ID, client_id)
        return True


class TextFormatter(logging.Formatter):
    """A record is a line, whatever its text holds: nobody can forge another by a line break in a path."""

    def __init__(self, worker: int | None = None) -> None:
        name = "%(name)s" if worker is None else f"worker {worker} %(name)s"
        super().__init__(f"%(asctime)s %(levelname)-7s {name}: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        ids = " ".join(
            str(getattr(record, key)) for key in (REQUEST_ID, COMPLETION_ID) if hasattr(record, key)
        )
        return escape(super().formatMessage(record) + (f" [{ids}]" if ids else ""))

    def formatException(self, ei: "logging._SysExcInfoType") -> str:
        return "\n".join("    | " + escape(line) for line in super().formatException(ei).splitlines())

    def formatStack(self, stack_info: str) -> str:
        return "\n".join("    | " + escape(line) for line in stack_info.splitlines())


def escape(text: str) -> str:
    """Control characters, line breaks of every kind and lone surrogates as backslash sequences."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _json_formatter(worker: int | None) -> logging.Formatter:
    return JsonFormatter(
        ["levelname", "name", "message"],
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp="time",
        static_fields={} if worker is None else {"worker": worker},
    )


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt | SystemExit):
        info = (kind, error or kind(), traceback)
        logging.getLogger("medusa").critical("uncaught exception", exc_info=info)
