"""`POST /v1/chat/completions`, streamed or not."""

import asyncio
import secrets
import time
from typing import Any

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from medusa_core.text.assembler import TextAssembler
from server import errors
from server.errors import ApiError
from server.observability.request_context import ChatContext, RequestContext, context_of
from server.pipeline.generation import Generation, TextDelta
from server.pipeline.responses import CLIENT_CLOSED, json_response
from server.pipeline.streaming import ChatStream, chat_events
from server.routes.dependencies import AppRuntime
from server.runtime import Runtime
from server.schemas.chat import ChatRequest
from server.schemas.completion import AssistantMessage, ChatChunk, ChatCompletion, Choice
from server.schemas.errors import ErrorResponse

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 408, 413, 429, 431, 500, 503)
}

router = APIRouter(tags=["chat"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=REFUSALS)
async def create_chat_completion(body: ChatRequest, request: HttpRequest, runtime: AppRuntime) -> Response:
    """Answer a conversation. With `stream` the answer is a stream of server-sent events."""
    if body.model != runtime.model_name:
        raise errors.model_not_found(body.model)
    context = context_of(request)
    generation = await _admit(body, context, runtime)
    if body.stream:
        return _stream(generation, body, runtime, context)
    return await _complete(generation, request, runtime)


async def _admit(body: ChatRequest, context: RequestContext, runtime: Runtime) -> Generation:
    """Prepare the request and queue it. Raises an `ApiError` if either cannot be done."""
    prompts = runtime.require_prompts()
    completion_id = f"chatcmpl-{secrets.token_hex(12)}"
    started = time.monotonic()
    with runtime.scheduler.preparing():
        prepared = await prompts.prepare(body, completion_id, context.request_id)
    ended = time.monotonic()
    runtime.require_prompts()  # a drain may have begun meanwhile
    context.set_completion(completion_id)
    job = runtime.scheduler.submit(prepared)
    keeps_text = runtime.settings.log_prompts
    context.chat = chat = ChatContext(
        request=prepared,
        timeline=job.timeline,
        assembler=TextAssembler(prompts.chat.tokenizer, prepared.params.stop),
        is_stream=bool(body.stream),
        prepare_started=started,
        prepare_ended=ended,
        messages=[(message.role, message.text) for message in body.messages] if keeps_text else None,
        answer="" if keeps_text else None,
    )
    return Generation(job, runtime.scheduler, chat.assembler, runtime.metrics, chat.add_text)


def _stream(generation: Generation, body: ChatRequest, runtime: Runtime, context: RequestContext) -> Response:
    def on_error(error: ApiError) -> None:
        runtime.metrics.observe_error(error.label)
        context.error = error.label

    template = ChatChunk(
        id=generation.job.request.request_id,
        created=int(time.time()),
        model=body.model,
        system_fingerprint=runtime.fingerprint,
        usage=None if body.stream_options and body.stream_options.include_usage else UNSET,
    )
    return ChatStream(
        chat_events(generation, template, on_error),
        on_close=lambda: runtime.scheduler.cancel(generation.job),
        keepalive=runtime.settings.keepalive,
        send_timeout=runtime.settings.send_timeout,
    )


async def _complete(generation: Generation, request: HttpRequest, runtime: Runtime) -> Response:
    answer = await _collect_unless_gone(generation, request)
    if answer is None:
        return Response(status_code=CLIENT_CLOSED)
    assert answer.finish_reason is not None
    completion = ChatCompletion(
        id=generation.job.request.request_id,
        created=int(time.time()),
        model=runtime.model_name,
        system_fingerprint=runtime.fingerprint,
        choices=[Choice(message=AssistantMessage(content=answer.text), finish_reason=answer.finish_reason)],
        usage=generation.usage(),
    )
    return json_response(completion)


async def _collect_unless_gone(generation: Generation, request: HttpRequest) -> TextDelta | None:
    """The answer; None if the client disconnects first, whose job ends with that."""
    collecting = asyncio.create_task(generation.collect())
    watching = asyncio.create_task(_wait_disconnect(request))
    try:
        await asyncio.wait((collecting, watching), return_when=asyncio.FIRST_COMPLETED)
        return collecting.result() if collecting.done() else None
    finally:
        for task in (collecting, watching):
            task.cancel()
        await asyncio.gather(collecting, watching, return_exceptions=True)


async def _wait_disconnect(request: HttpRequest) -> None:
    # The body has been read, so all that can still come is the disconnect.
    while (await request.receive())["type"] != "http.disconnect":
        pass
