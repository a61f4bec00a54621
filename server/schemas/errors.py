"""OpenAI's error body: all four keys are always present, `param` and `code` may be null."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorDetail:
    """What went wrong; `param` is a path into the request such as `messages[0].content`."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """The body of every answer with status 400 or above, and of an error event inside a stream."""

    error: ErrorDetail
