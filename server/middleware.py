"""Plain ASGI layers around the routes. Starlette's `BaseHTTPMiddleware` would hide client disconnects."""

import logging
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import errors
from server.metrics import ServerMetrics
from server.responses import error_response

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestContext:
    """Gives every response an `x-request-id`, the client's own if it is sane; shapes crashes like OpenAI."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        if headers.get("x-stainless-retry-count", "0") not in ("", "0"):
            self._metrics.client_retries.inc()
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            if has_started:
                raise
            logger.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            await error_response(errors.internal())(scope, receive, send_with_id)


class BodyLimit:
    """Refuses bodies above `limit` bytes with a 413, by their declared length or as they come in."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self._limit:
            await error_response(errors.too_large(self._limit))(scope, receive, send)
            return
        received = 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                # FastAPI lets this one type through while it reads a body.
                raise HTTPException(413)
            return message

        await self._app(scope, counted_receive, send)


def _request_id(given: str | None) -> str:
    return given if given is not None and REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
