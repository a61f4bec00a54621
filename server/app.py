"""Assembles the FastAPI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import medusa_core
from server import errors
from server.errors import ApiError
from server.middleware import BodyLimit, RequestContext
from server.responses import error_response
from server.routes import chat, health, metrics, models
from server.runtime import Runtime
from server.settings import Settings


def create_app(settings: Settings) -> FastAPI:
    """The application. Its lifespan starts and ends the workers; it answers while they still load."""
    app = FastAPI(title="Medusa", version=medusa_core.__version__, lifespan=_lifespan)
    app.state.runtime = runtime = Runtime(settings)
    for module in (chat, models, health):
        app.include_router(module.router)
    if settings.metrics_port is None:
        app.include_router(metrics.router)
    app.add_exception_handler(ApiError, _handle_api_error)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(RequestContext, metrics=runtime.metrics)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    runtime: Runtime = app.state.runtime
    runtime.start()
    try:
        yield
    finally:
        await runtime.stop()


async def _handle_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _handle_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(errors.from_validation(error.errors()))


async def _handle_http_exception(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths, wrong methods, unreadable bodies."""
    assert isinstance(error, HTTPException)
    line = f"{request.method} {request.url.path}"
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            refusal = ApiError(404, f"Invalid URL ({line}).", code="unknown_url")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            refusal = ApiError(405, f"Method not allowed ({line}).", code="method_not_allowed")
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            refusal = errors.too_large(request.app.state.runtime.settings.max_body_bytes)
        case status:
            refusal = ApiError(status, "The body of the request could not be read.", code="invalid_body")
    response = error_response(refusal)
    if error.headers is not None and "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response
