"""uvicorn's HTTP/1.1 with what it lacks: time limits for headers and leftovers, and refusals like OpenAI's.

Without these a client could hold a connection for ever: by sending half a header, or by never ending the body
of a request that has been answered.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from server import errors
from server.errors import ApiError

LEFTOVER_SECONDS = 5.0  # to finish sending a request that has been answered already


def build_protocol(header_timeout: float, on_refusal: Callable[[ApiError], None]) -> type[H11Protocol]:
    """A protocol for `uvicorn.Config(http=...)` whose clients have `header_timeout` seconds for headers.

    `on_refusal` hears of the errors that are told before there is a request.
    """

    class Protocol(BoundedProtocol):
        header_seconds = header_timeout

        def note_refusal(self, error: ApiError) -> None:
            on_refusal(error)

    return Protocol


class BoundedProtocol(H11Protocol):
    """One connection. A timer runs while we wait for a request to arrive whole that is not being answered."""

    header_seconds = 60.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """What h11 refuses: no HTTP, or headers that grow beyond the limit."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # rubbish after a request that is being answered
            return
        limit = self.config.h11_max_incomplete_event_size
        unread, _ = self.conn.trailing_data
        is_too_large = limit is not None and len(unread) > limit
        self._refuse(errors.headers_too_large(limit or 0) if is_too_large else errors.malformed())

    def note_refusal(self, error: ApiError) -> None:
        """For whoever counts."""

    def _refuse(self, error: ApiError) -> None:
        self.note_refusal(error)
        body = msgspec.json.encode(error.body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        reason = HTTPStatus(error.status).phrase.encode()
        for event in (
            h11.Response(status_code=error.status, headers=headers, reason=reason),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            # The application, if it was reading a body, sees that the client is gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _watch(self) -> None:
        """Set the timer for what the client has to do next, unless it runs for that very thing."""
        seconds = self._seconds_left()
        if seconds is None:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(seconds, self._expire)

    def _seconds_left(self) -> float | None:
        if self.transport.is_closing():
            return None
        is_answered = self.cycle is None or self.cycle.response_complete
        if not is_answered or self.timeout_keep_alive_task is not None:
            return None  # the application has its own limits, and an idle connection uvicorn's
        is_new = self.conn.their_state is h11.IDLE
        return self.header_seconds if is_new else min(LEFTOVER_SECONDS, self.header_seconds)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()
