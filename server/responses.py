"""JSON responses, encoded by msgspec."""

from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from server.errors import ApiError

_json = msgspec.json.Encoder()


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_json.encode(value), status_code=status, headers=headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body, error.status, error.headers)
