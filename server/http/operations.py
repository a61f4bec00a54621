"""The operations port: probes and metrics apart from the API, for networks that clients do not reach."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.types import ASGIApp

from server.http.protocol import BoundedProtocol

logger = logging.getLogger(__name__)


class _QuietServer(uvicorn.Server):
    """A second uvicorn on the same event loop: signals belong to the first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            logger.info("metrics and probes on http://%s:%d", *listener.getsockname()[:2])


@contextlib.asynccontextmanager
async def serve_operations(app: ASGIApp, listener: socket.socket) -> AsyncIterator[None]:
    """Serve `app` on `listener` meanwhile, and close it at the end."""
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = _QuietServer(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="operations")
    try:
        yield
    finally:
        server.should_exit = True
        await task
        listener.close()
