"""Limits of one request: the size of its headers and body, and how long the body may take to arrive."""

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import errors
from server.errors import ApiError
from server.pipeline.responses import error_response
from server.settings import Settings

LINE_OVERHEAD = 4  # bytes of a header line besides name and value


class BodyRefused(HTTPException):
    """Raised where a body is read; FastAPI lets no other type through there.

    The connection ends with the answer, since the rest of the body would be in the way.
    """

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status, headers={"connection": "close"})
        self.error = error


class RequestLimits:
    """Answers 431, 413 or 408. Sizes are in bytes; a body has `body_timeout` seconds to arrive whole."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        # uvicorn bounds headers that come in pieces, but not those that come at once.
        if _header_bytes(scope) > self._settings.max_header_bytes:
            refusal = errors.headers_too_large(self._settings.max_header_bytes)
        elif declared.isdigit() and int(declared) > self._settings.max_body_bytes:
            refusal = errors.too_large(self._settings.max_body_bytes)
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
                deadline = asyncio.get_running_loop().time() + self._settings.body_timeout
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise BodyRefused(errors.body_timeout(self._settings.body_timeout)) from None
            received += len(message.get("body", b""))
            if received > self._settings.max_body_bytes:
                raise BodyRefused(errors.too_large(self._settings.max_body_bytes))
            if not message.get("more_body", False):
                deadline = float("inf")  # what can still come is the disconnect
            return message

        return receive_limited


def _header_bytes(scope: Scope) -> int:
    line = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return line + sum(len(name) + len(value) + LINE_OVERHEAD for name, value in scope["headers"])
