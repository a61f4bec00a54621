"""Server-sent events of a streamed answer, in OpenAI's exact order and shape."""

import logging
from collections.abc import AsyncIterator, Callable

import msgspec
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.types import Receive, Scope, Send

from server import errors
from server.errors import ApiError
from server.pipeline.generation import Generation
from server.schemas.completion import ChatChunk, ChunkChoice, Delta

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"

_json = msgspec.json.Encoder()


def sse_data(value: object) -> bytes:
    """One event; JSON has no raw line breaks, so it needs no splitting."""
    return b"data: " + _json.encode(value) + b"\n\n"


def chunk(template: ChatChunk, delta: Delta, finish_reason: str | None = None) -> bytes:
    """A chunk with a choice."""
    choice = ChunkChoice(delta=delta, finish_reason=finish_reason)
    return sse_data(msgspec.structs.replace(template, choices=(choice,)))


async def chat_events(
    generation: Generation, template: ChatChunk, on_error: Callable[[ApiError], None]
) -> AsyncIterator[bytes]:
    """All frames of an answer. The status is out, so an error is an event too; `[DONE]` is always last.

    `template`: what all chunks have in common; with a `usage` of None, one without choices tells it at the
    end. `on_error` hears of the error that a client is told of.
    """
    yield chunk(template, Delta(role="assistant", content=""))
    try:
        async for delta in generation.deltas():
            frames = chunk(template, Delta(content=delta.text)) if delta.text else b""
            if delta.finish_reason is not None:
                frames += chunk(template, Delta(), delta.finish_reason)
                if template.usage is None:
                    frames += sse_data(msgspec.structs.replace(template, usage=generation.usage()))
                frames += DONE
            yield frames
    except Exception as error:  # the one boundary where any failure must become an event
        if not isinstance(error, ApiError):
            logger.exception("the request failed while streaming", extra=generation.job.log_ids)
        told = error if isinstance(error, ApiError) else errors.internal()
        on_error(told)
        yield _request_comment(generation.job.request.client_id) + sse_data(told.body) + DONE


def _request_comment(client_id: str) -> bytes:
    """The request id for whoever reads the stream without its headers; SSE parsers skip comments."""
    return f": x-request-id {client_id}\n".encode() if client_id else b""


class ChatStream(EventSourceResponse):
    """An SSE response that always calls `on_close`, even if its iterator never started."""

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        *,
        on_close: Callable[[], None],
        keepalive: float,
        send_timeout: float,
    ) -> None:
        super().__init__(
            frames,
            ping=keepalive,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            sep="\n",
            send_timeout=send_timeout,
        )
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except* SendTimeoutError:  # of a frame, a keep-alive comment, or both at once
            logger.warning("a client left its stream unread and is cut off")
        finally:
            self._on_close()
