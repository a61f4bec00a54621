"""How routes reach the running server."""

from typing import Annotated, cast

from fastapi import Depends
from starlette.requests import Request

from server.runtime import Runtime


# Async though nothing waits: FastAPI would run a plain function in a thread, once a request.
async def _get_runtime(request: Request) -> Runtime:
    return cast(Runtime, request.app.state.runtime)


AppRuntime = Annotated[Runtime, Depends(_get_runtime)]
