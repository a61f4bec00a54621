"""Limits of one request: the size of its headers and body, and how long the body may take to arrive."""

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import errors
from server.errors import ApiError
from server.pipeline.responses import error_response

LINE_OVERHEAD = 4  # bytes of a header line besides name and value


class BodyRefused(HTTPException):
    """Raised where a body is read; FastAPI lets no other type through there."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status)
        self.error = error


class RequestLimits:
    """Answers 431, 413 or 408. Sizes are in bytes; a body has `body_timeout` seconds to arrive whole."""

    def __init__(
        self, app: ASGIApp, *, max_header_bytes: int, max_body_bytes: int, body_timeout: float
    ) -> None:
        self._app = app
        self._max_header_bytes = max_header_bytes
        self._max_body_bytes = max_body_bytes
        self._body_timeout = body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        # uvicorn bounds headers that come in pieces, but not those that come at once.
        if _header_bytes(scope) > self._max_header_bytes:
            refusal = errors.headers_too_large(self._max_header_bytes)
        elif declared.isdigit() and int(declared) > self._max_body_bytes:
            refusal = errors.too_large(self._max_body_bytes)
        else:
            await self._app(scope, self._limited(receive), send)
            return
        await error_response(refusal)(scope, receive, send)

    def _limited(self, receive: Receive) -> Receive:
        deadline: float | None = None
        received = 0

        async def receive_limited() -> Message:
            nonlocal deadline, received
            if deadline is None:
                deadline = asyncio.get_running_loop().time() + self._body_timeout
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise BodyRefused(errors.body_timeout(self._body_timeout)) from None
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise BodyRefused(errors.too_large(self._max_body_bytes))
            if not message.get("more_body", False):
                deadline = float("inf")  # what can still come is the disconnect
            return message

        return receive_limited


async def handle_body_refused(request: Request, error: Exception) -> Response:
    """The answer; the connection ends with it, since the rest of the body would be in the way."""
    assert isinstance(error, BodyRefused)
    response = error_response(error.error)
    response.headers["connection"] = "close"
    return response


def _header_bytes(scope: Scope) -> int:
    line = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return line + sum(len(name) + len(value) + LINE_OVERHEAD for name, value in scope["headers"])
