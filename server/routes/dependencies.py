"""How routes reach the running server."""

from typing import cast

from starlette.requests import Request

from server.runtime import Runtime


# Async though nothing waits: FastAPI would run a plain function in a thread, once a request.
async def get_runtime(request: Request) -> Runtime:
    return cast(Runtime, request.app.state.runtime)
