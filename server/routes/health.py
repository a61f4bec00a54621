"""`/health`: the process answers. `/ready`: a request would be served now."""

from fastapi import APIRouter
from starlette.responses import Response

from server import errors
from server.pipeline.responses import json_response
from server.routes.dependencies import AppRuntime

router = APIRouter(tags=["operation"])


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> Response:
    return json_response({"status": "ok"})


@router.get("/ready", responses={503: {"description": "Not ready; `reason` says why."}})
async def ready(runtime: AppRuntime) -> Response:
    reason = runtime.why_not_ready()
    if reason is None:
        return json_response({"status": "ready"})
    return json_response({"status": "unavailable", "reason": errors.without_paths(reason)}, 503)
