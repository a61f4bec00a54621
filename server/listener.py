"""Listening sockets and a uvicorn server that drains on SIGTERM before it shuts down."""

import logging
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from medusa_core.errors import ConfigError, MedusaError
from server.app import create_app
from server.runtime import Runtime
from server.settings import Settings

logger = logging.getLogger(__name__)

BACKLOG = 2048
FLUSH_SECONDS = 5  # for responses that have ended to reach slow readers


class DrainingServer(uvicorn.Server):
    """The first SIGTERM or SIGINT starts a drain, the second ends at once.

    While it drains, connections still get answers: refusals, health and metrics.
    """

    def __init__(self, config: uvicorn.Config, runtime: Runtime) -> None:
        super().__init__(config)
        self._runtime = runtime
        self._num_signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # In a signal handler: leave a mark for `on_tick`, which runs every 0.1 s on the event loop. uvicorn's
        # own list of captured signals stays empty, so that a finished drain exits with 0, not by the signal.
        self._num_signals += 1
        if self._num_signals > 1:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._num_signals:
            self._runtime.start_drain()
        has_ended = self._runtime.is_drained or self._runtime.start_error is not None
        return await super().on_tick(counter) or has_ended


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ConfigError` if the address is taken or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol named, as asyncio turns Nagle's algorithm off for such sockets only: otherwise the
        # second chunk of a stream waits for the client's delayed acknowledgement of the first, 40 ms.
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def build_server(app: FastAPI) -> DrainingServer:
    """A server for an app of `create_app`; `run(sockets=[listener])` runs it."""
    config = uvicorn.Config(
        app,
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
    logger.info("listening on http://%s:%d", settings.host, listener.getsockname()[1])
    try:
        server.run(sockets=[listener])
    finally:
        # After a second signal nobody has told the workers.
        runtime.pool.kill()
        listener.close()
    if runtime.start_error is not None:
        raise runtime.start_error
    if server.force_exit:
        raise MedusaError("ended at once by a second signal; requests were cut off")
