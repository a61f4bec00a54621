"""Plain ASGI layers around the routes. Starlette's `BaseHTTPMiddleware` would hide client disconnects."""

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import errors
from server.observability.logging import REQUEST_ID, request_ids
from server.observability.metrics import UNROUTED, ServerMetrics
from server.observability.request_context import RequestContext, put_context
from server.observability.request_log import log_request
from server.observability.tracing import Tracing
from server.pipeline.responses import ERROR_CODE, error_response

logger = logging.getLogger(__name__)

TRACE_HEADERS = ("traceparent", "tracestate")
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestContextMiddleware:
    """Gives every request a context and every response an `x-request-id`, the client's own if it is sane.

    At its end a request is counted, traced and goes to the request log.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, tracing: Tracing | None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        context = _new_context(scope, headers)
        put_context(scope, context)
        token = request_ids.set(context.ids)
        if headers.get("x-stainless-retry-count", "0") not in ("", "0"):
            self._metrics.client_retries.inc()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = context.request_id
                self._count(scope, context, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            context.ended = time.monotonic()
            log_request(context, None if self._tracing is None else self._tracing.export(context))
            request_ids.reset(token)

    def _count(self, scope: Scope, context: RequestContext, status: int) -> None:
        context.status = status
        context.route = getattr(scope.get("route"), "path", None)
        self._metrics.observe_response(context.route or UNROUTED, status)
        if ERROR_CODE in scope:
            context.error = scope[ERROR_CODE]
            self._metrics.observe_error(scope[ERROR_CODE])


class ShapeCrashes:
    """Turns an exception of ours into a 500 in OpenAI's shape, unless the response has begun."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_started = False

        async def noting_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception:
            if has_started:
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await error_response(errors.internal())(scope, receive, noting_send)


def _new_context(scope: Scope, headers: Headers) -> RequestContext:
    client = scope.get("client")
    return RequestContext(
        method=scope["method"],
        path=scope["path"],
        scheme=scope.get("scheme", "http"),
        client=client[0] if client else "-",
        trace_context={name: headers[name] for name in TRACE_HEADERS if name in headers},
        ids={REQUEST_ID: _request_id(headers.get("x-request-id"))},
    )


def _request_id(given: str | None) -> str:
    return given if given is not None and SANE_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
