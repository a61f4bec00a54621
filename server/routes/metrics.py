"""`GET /metrics` for Prometheus, unless `MEDUSA_METRICS_PORT` gives it a port of its own."""

from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from server.routes.dependencies import AppRuntime

router = APIRouter(tags=["operation"])


@router.get("/metrics", response_class=Response)
async def metrics(runtime: AppRuntime) -> Response:
    return Response(generate_latest(runtime.metrics.registry), media_type=CONTENT_TYPE_LATEST)
