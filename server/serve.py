"""Runs the application in a uvicorn server that drains on SIGTERM before it shuts down."""

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from medusa_core.errors import MedusaError
from server.app import create_app
from server.http.protocol import build_protocol
from server.http.sockets import BACKLOG, bind
from server.runtime import Runtime
from server.settings import Settings

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 5  # for responses that have ended to reach slow readers


class DrainingServer(uvicorn.Server):
    """The first SIGTERM, SIGINT or SIGHUP starts a drain, the second ends at once.

    While it drains, connections still get answers: refusals, health and metrics.
    """

    def __init__(self, config: uvicorn.Config, runtime: Runtime) -> None:
        super().__init__(config)
        self._runtime = runtime
        self._num_signals = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        with super().capture_signals(), _handle_hangup(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # In a signal handler: leave a mark for `on_tick`, which runs every 0.1 s on the event loop. uvicorn's
        # own list of captured signals stays empty, so that a finished drain exits with 0, not by the signal.
        self._num_signals += 1
        if self._num_signals > 1:
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._num_signals:
            self._runtime.start_drain()
        has_ended = self._runtime.is_drained or self._runtime.start_error is not None or self.force_exit
        return await super().on_tick(counter) or has_ended

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or () if self.started else ():
            logger.info("listening on http://%s:%d", *listener.getsockname()[:2])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.force_exit:
            self._runtime.end_requests()
        await super().shutdown(sockets)
        if self.force_exit:
            # uvicorn leaves the lifespan's end out. Cancelled with the loop it would wait for busy workers
            # and log a traceback.
            self._runtime.pool.kill()
            await self.lifespan.shutdown()


@contextlib.contextmanager
def _handle_hangup(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """The terminal that goes drains too, unless `nohup` has said that it does not matter."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def build_server(app: FastAPI) -> DrainingServer:
    """A server for an app of `create_app`; `run(sockets=[listener])` runs it."""
    settings: Settings = app.state.runtime.settings
    config = uvicorn.Config(
        app,
        access_log=False,  # `server.access` knows more
        loop="asyncio",  # also where something else, Ray for one, has brought uvloop along
        http=build_protocol(settings.body_timeout, app.state.runtime.metrics.observe_refusal),
        h11_max_incomplete_event_size=settings.max_header_bytes,
        log_config=None,
        lifespan="on",
        ws="none",
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )
    return DrainingServer(config, app.state.runtime)


def serve(settings: Settings) -> None:
    """Run the server until it is told to end. Raises a `MedusaError` if it cannot start."""
    listener = bind(settings.host, settings.port)  # before the model loads
    app = create_app(settings)
    runtime: Runtime = app.state.runtime
    server = build_server(app)
    try:
        server.run(sockets=[listener])
    finally:
        # After a second signal nobody has told the workers.
        runtime.pool.kill()
        listener.close()
    if runtime.start_error is not None:
        raise runtime.start_error
    if server.force_exit:
        raise MedusaError("ended at once by a second signal; requests ended with an error")
