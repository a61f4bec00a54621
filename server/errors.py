"""Errors a client sees, always in OpenAI's shape, and nothing of our insides in them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from server.schemas.errors import ErrorDetail, ErrorResponse

MAX_MESSAGE = 400  # characters of a validation message, and of any name a client made up
RETRY_SOON = 1  # seconds; a queue that is full now has room as soon as one request ends
RETRY_LATER = 5  # seconds; loading, draining or restarting takes a while

PATH = re.compile(r"(?<![\w/])/(?:[^\s/:'\"]+/)+")  # the folders of an absolute path

KIND_BY_STATUS = {429: "rate_limit_exceeded", 500: "server_error", 503: "overloaded"}
# pydantic's errors that are not about a value: their code and what they say.
ABOUT_NAMES = {
    "missing": ("missing_required_parameter", "Missing required parameter"),
    "extra_forbidden": ("unknown_parameter", "Unknown parameter"),
    "unsupported_parameter": ("unsupported_parameter", "Unsupported parameter"),
}
PYTHON_WORDS = {
    "a valid dictionary": "an object",
    "a valid list": "an array",
    " or object to extract fields from": "",
}


class ApiError(Exception):
    """A refusal or failure of one request: HTTP status and error body, or an error event inside a stream.

    `kind` None is what the status usually means. `retry_after` is in seconds. `should_retry` False tells
    OpenAI's SDK that the same request fails again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.should_retry = should_retry
        self.detail = ErrorDetail(
            message=_printable(message),
            type=kind or KIND_BY_STATUS.get(status, "invalid_request_error"),
            param=param and _printable(param),
            code=code,
        )

    @property
    def body(self) -> ErrorResponse:
        return ErrorResponse(self.detail)

    @property
    def label(self) -> str:
        """What metrics and logs call it: the code, or the type where there is none."""
        return self.detail.code or self.detail.type

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.should_retry is not None:
            headers["x-should-retry"] = "true" if self.should_retry else "false"
        return headers


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """400: the client must change the request."""
    return ApiError(400, message, param=param, code=code)


def model_not_found(name: str) -> ApiError:
    """404: not the model we serve."""
    return ApiError(404, f"The model '{_cut(name)}' does not exist.", param="model", code="model_not_found")


def bad_key(*, is_missing: bool) -> ApiError:
    """401: no API key, or an unknown one; which, and how near it came, is not told."""
    message = (
        "You didn't provide an API key; send one as Authorization: Bearer YOUR_KEY."
        if is_missing
        else "Incorrect API key provided."
    )
    return ApiError(401, message, code="invalid_api_key")


def body_timeout(seconds: float) -> ApiError:
    """408: the body did not arrive whole in time."""
    return ApiError(
        408, f"The request body did not arrive within {seconds:g} seconds.", code="request_timeout"
    )


def headers_too_large(limit: int) -> ApiError:
    """431: request line and headers exceed the limit in bytes."""
    return ApiError(431, f"The request headers exceed {limit} bytes.", code="headers_too_large")


def malformed() -> ApiError:
    """400: what came was not HTTP."""
    return ApiError(400, "Invalid HTTP request received.", code="invalid_http")


def too_large(limit: int) -> ApiError:
    """413: the body exceeds the limit in bytes."""
    return ApiError(413, f"The request body exceeds {limit} bytes.", code="request_too_large")


def queue_full() -> ApiError:
    """429: every slot is taken and the queue is full."""
    message = "The server is busy and its queue is full; try again shortly."
    return ApiError(429, message, code="rate_limit_exceeded", retry_after=RETRY_SOON)


def internal() -> ApiError:
    """500: our fault; the log has the details."""
    return ApiError(500, "The server had an error while processing your request.")


def generation_failed() -> ApiError:
    """500: the engine gave up on this request alone; it would again."""
    return ApiError(500, "The model failed on this request.", code="generation_failed", should_retry=False)


def out_of_memory() -> ApiError:
    """503: the device had no room for this request's next step; another time it may."""
    message = "The server ran out of memory on this request; try again, or with fewer tokens."
    return ApiError(503, message, kind="server_error", code="out_of_memory", retry_after=RETRY_LATER)


def worker_lost() -> ApiError:
    """500: the worker died or hung while this request was running on it."""
    return ApiError(500, "The worker died while generating; please retry.", code="worker_lost")


def unavailable(message: str, code: str) -> ApiError:
    """503: not now, later perhaps."""
    return ApiError(503, message, code=code, retry_after=RETRY_LATER)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 from pydantic's error list: the first of them, named the way OpenAI names parameters."""
    first = errors[0]
    kind, location = str(first["type"]), tuple(first["loc"])
    if kind == "json_invalid":
        return invalid("The body of the request is not valid JSON.", code="invalid_json")
    param = _param(location)
    if kind == "too_many_members" and param is None:
        return invalid(f"The body of the request {_cut(str(first['msg']))}.", code="invalid_body")
    if param is None:
        return invalid(
            "The body of the request must be a JSON object sent as application/json.", code="invalid_body"
        )
    name = _cut(param)
    if kind in ABOUT_NAMES:
        code, says = ABOUT_NAMES[kind]
        return invalid(f"{says}: '{name}'.", name, code)
    code = "invalid_type" if kind.endswith("type") else "invalid_value"
    message = f"Invalid value for '{name}': {_cut(_in_json_words(kind, str(first['msg'])))}."
    return invalid(message, name, kind if kind == "unsupported_value" else code)


def _in_json_words(kind: str, message: str) -> str:
    """pydantic's message for somebody who writes JSON: its own kinds of value, and its quotes."""
    for python, json in PYTHON_WORDS.items():
        message = message.replace(python, json)
    return message.replace("'", '"') if kind in ("enum", "literal_error") else message


def without_paths(text: str) -> str:
    """Paths of the server's files down to their names: where they lie is for the log."""
    return PATH.sub("", text)


def _param(location: tuple[str | int, ...]) -> str | None:
    """`messages[0].content` from ("body", "messages", 0, "content"); None for the body itself."""
    path = ""
    for part in location[1:] if location[:1] == ("body",) else location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path or None


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…"


def _printable(text: str) -> str:
    """Without lone surrogates, which JSON lets a client send and UTF-8 cannot carry back."""
    return text.encode("utf-8", "replace").decode("utf-8")
