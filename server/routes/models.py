"""`GET /v1/models`: the one model that is served."""

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server import errors
from server.pipeline.responses import json_response
from server.routes.dependencies import AppRuntime
from server.runtime import Runtime
from server.schemas.errors import ErrorResponse
from server.schemas.models import Model, ModelList

router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model=ModelList)
async def list_models(runtime: AppRuntime) -> Response:
    return json_response(ModelList(data=[_model(runtime)]))


# A name may hold slashes, as hub ids do.
@router.get("/v1/models/{model:path}", response_model=Model, responses={404: {"model": ErrorResponse}})
async def retrieve_model(model: str, runtime: AppRuntime) -> Response:
    if not model:
        raise HTTPException(404)  # `/v1/models/`: an unknown path, no unknown model
    if model != runtime.model_name:
        raise errors.model_not_found(model)
    return json_response(_model(runtime))


def _model(runtime: Runtime) -> Model:
    return Model(
        id=runtime.model_name,
        created=runtime.created,
        context_length=runtime.prompts.info.context_length if runtime.prompts else None,
    )
