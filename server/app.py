"""Assembles the FastAPI application."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

import medusa_core
from medusa_core.errors import ConfigError
from server import errors
from server.errors import ApiError
from server.http.auth import RequireKey, load_keys
from server.http.limits import BodyRefused, RequestLimits
from server.http.middleware import RequestContextMiddleware, ShapeCrashes
from server.http.operations import serve_operations
from server.http.sockets import bind
from server.pipeline.responses import CLIENT_CLOSED, error_response
from server.routes import chat, health, metrics, models
from server.runtime import Runtime
from server.settings import Settings, split_list

ENDPOINTS = (("POST", "/v1/chat/completions"), ("GET", "/v1/models"))


def create_app(settings: Settings) -> FastAPI:
    """The application. Its lifespan starts and ends the workers; it answers while they still load."""
    app = FastAPI(title="Medusa", version=medusa_core.__version__, lifespan=_lifespan)
    app.state.runtime = runtime = Runtime(settings)
    for module in (chat, models, health):
        app.include_router(module.router)
    if settings.metrics_port is None:
        app.include_router(metrics.router)
    for kind in (ApiError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle_error)
    _add_layers(app, runtime)
    return app


def _add_layers(app: FastAPI, runtime: Runtime) -> None:
    """What a request passes before it reaches a route, the innermost first."""
    settings = runtime.settings
    app.add_middleware(RequestLimits, settings=settings)
    keys = load_keys(settings)
    if keys is not None:
        app.add_middleware(RequireKey, keys=keys)
    app.add_middleware(ShapeCrashes)
    if settings.cors_origins is not None:
        # Before keys are asked for: a browser's preflight cannot carry one. Cookies are never accepted.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=split_list(settings.cors_origins),
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after", "x-should-retry"),
        )
    app.add_middleware(RequestContextMiddleware, metrics=runtime.metrics, tracing=runtime.tracing)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    runtime: Runtime = app.state.runtime
    settings = runtime.settings
    async with AsyncExitStack() as stack:
        try:
            if settings.metrics_port is not None:
                listener = bind(settings.host, settings.metrics_port)
                await stack.enter_async_context(serve_operations(_operations_app(runtime), listener))
        except ConfigError as error:
            runtime.start_error = ConfigError(f"no operations port: {error}")
        else:
            runtime.start()
        # Before the operations port closes: a drain can be watched to its end.
        stack.push_async_callback(runtime.stop)
        yield


def _operations_app(runtime: Runtime) -> FastAPI:
    """Probes and metrics alone, without keys: its port is for the machine's own network."""
    app = FastAPI(title="Medusa operations", openapi_url=None)
    app.state.runtime = runtime
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.add_exception_handler(HTTPException, _handle_error)
    return app


async def _handle_error(request: Request, error: Exception) -> Response:
    if isinstance(error.__cause__, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED)
    match error:
        case ApiError():
            refusal = error
        case RequestValidationError():
            refusal = errors.from_validation(error.errors())
        case BodyRefused():
            refusal = error.error
        case _:
            assert isinstance(error, HTTPException)
            refusal = _refused_by_framework(request, error.status_code)
    response = error_response(refusal)
    # Which methods are allowed, or that the connection ends.
    response.headers.update(getattr(error, "headers", None) or {})
    return response


def _refused_by_framework(request: Request, status: int) -> ApiError:
    """Unknown paths, wrong methods, unreadable bodies."""
    line = f"{request.method} {request.url.path}"
    match status:
        case HTTPStatus.NOT_FOUND:
            return ApiError(404, f"Invalid URL ({line}).{_hint(request)}", code="unknown_url")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return ApiError(405, f"Method not allowed ({line}).", code="method_not_allowed")
    return ApiError(status, "The body of the request could not be read.", code="invalid_body")


def _hint(request: Request) -> str:
    """The route that was probably meant: clients forget `/v1`, or add a slash."""
    path = request.url.path.strip("/")
    meant = path if path.startswith("v1/") else f"v1/{path}"
    for method, name in ENDPOINTS:
        if name == f"/{meant}" and name != request.url.path:
            return f" Did you mean {method} {name}?"
    return ""
