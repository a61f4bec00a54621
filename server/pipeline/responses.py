"""JSON responses, encoded by msgspec."""

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ApiError

CLIENT_CLOSED = 499  # nobody reads it; the request log does
ERROR_CODE = "medusa.error_code"  # key of the ASGI scope

_json = msgspec.json.Encoder()


def json_response(value: object, status: int = 200) -> Response:
    return Response(_json.encode(value), status_code=status, media_type="application/json")


class ErrorResponse(Response):
    """An error's response; leaves the error's code in the scope for `RequestContextMiddleware` to count."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(
            _json.encode(error.body),
            status_code=error.status,
            headers=error.headers,
            media_type="application/json",
        )
        self._label = error.label

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[ERROR_CODE] = self._label
        await super().__call__(scope, receive, send)


def error_response(error: ApiError) -> Response:
    return ErrorResponse(error)
