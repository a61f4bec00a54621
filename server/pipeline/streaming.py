"""Server-sent events of a streamed answer, in OpenAI's exact order and shape."""

import logging
from collections.abc import AsyncIterator, Callable, Mapping

import msgspec
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.types import Receive, Scope, Send

from server import errors
from server.errors import ApiError
from server.pipeline.generation import Generation
from server.schemas.completion import ChatChunk, ChunkChoice, Delta, Usage

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"

_json = msgspec.json.Encoder()


class ChunkEncoder:
    """Chunks of one answer as SSE frames: id, time, model and fingerprint stay the same throughout."""

    def __init__(
        self, *, completion_id: str, created: int, model: str, fingerprint: str, include_usage: bool
    ) -> None:
        self._chunk = ChatChunk(
            id=completion_id,
            created=created,
            model=model,
            system_fingerprint=fingerprint,
            choices=(),
            usage=None if include_usage else msgspec.UNSET,
        )

    def role(self) -> bytes:
        """The first chunk."""
        return self._frame(Delta(role="assistant", content=""))

    def content(self, text: str) -> bytes:
        return self._frame(Delta(content=text))

    def finish(self, reason: str) -> bytes:
        """The last chunk with a choice."""
        return self._frame(Delta(), reason)

    def usage(self, usage: Usage) -> bytes:
        """The chunk without choices that a client asks for with `include_usage`."""
        return sse_data(msgspec.structs.replace(self._chunk, usage=usage))

    def _frame(self, delta: Delta, finish_reason: str | None = None) -> bytes:
        choice = ChunkChoice(delta=delta, finish_reason=finish_reason)
        return sse_data(msgspec.structs.replace(self._chunk, choices=(choice,)))


def sse_data(value: object) -> bytes:
    """One event; JSON has no raw line breaks, so it needs no splitting."""
    return b"data: " + _json.encode(value) + b"\n\n"


async def chat_events(
    generation: Generation,
    encoder: ChunkEncoder,
    *,
    include_usage: bool,
    on_error: Callable[[ApiError], None],
) -> AsyncIterator[bytes]:
    """All frames of an answer. The status is out, so an error is an event too; `[DONE]` is always last.

    `on_error` hears of the error that a client is told of.
    """
    yield encoder.role()
    try:
        async for delta in generation.deltas():
            frames = encoder.content(delta.text) if delta.text else b""
            if delta.finish_reason is not None:
                frames += encoder.finish(delta.finish_reason)
                if include_usage:
                    frames += encoder.usage(generation.usage())
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
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            frames,
            ping=keepalive,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            sep="\n",
            send_timeout=send_timeout,
            headers=headers,
        )
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except* SendTimeoutError:  # of a frame, a keep-alive comment, or both at once
            logger.warning("a client left its stream unread and is cut off")
        finally:
            self._on_close()
