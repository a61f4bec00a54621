"""The server as a Ray Serve application. A replica is what `medusa serve` is: an app, a queue, its workers.

Settings are the same `MEDUSA_…` variables, given in the Serve config file. Ray's proxy takes the place of our
own listener, so `MEDUSA_PORT` means nothing here; `MEDUSA_METRICS_PORT` is the first of a range, see below.
"""

import asyncio
import logging
import socket

from fastapi import FastAPI
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medusa_core.errors import ConfigError
from server.app import create_app
from server.observability.logging import configure_logging
from server.runtime import Runtime
from server.settings import Settings, load_settings, unknown_variables

PORTS = 16  # operations ports a node's replicas choose from, and that Prometheus has to look at
POLL_SECONDS = 0.1

logger = logging.getLogger(__name__)


class Replica:
    """One replica. Ray builds the app in the replica's process, so nothing of it is pickled."""

    def __init__(self) -> None:
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format)  # to standard error, which Ray keeps
        for name in unknown_variables():
            logger.warning("%s is set, but there is no such setting", name)
        if settings.metrics_port:
            rank = serve.get_replica_context().rank.local_rank
            port = free_port(settings.host, settings.metrics_port, rank)
            settings = settings.model_copy(update={"metrics_port": port})
        self._settings: Settings = settings
        self._has_loaded = False

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(self._settings)
        app.add_middleware(WithoutRequestId)
        self._runtime: Runtime = app.state.runtime
        return app

    async def check_health(self) -> None:
        """Raises while requests would not be served; Ray replaces a replica that stays so.

        The first check is part of a replica's start: it waits for the model, and no requests come before.
        """
        while not self._has_loaded and self._runtime.start_error is None:
            self._has_loaded = self._runtime.why_not_ready() is None
            await asyncio.sleep(POLL_SECONDS)
        reason = self._runtime.why_not_ready()
        if reason is not None:
            raise RuntimeError(f"not ready: {reason}")


class WithoutRequestId:
    """Leaves `x-request-id` to Ray's proxy, which puts it on every request and on its response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without)


def free_port(host: str, first: int, offset: int) -> int:
    """A port that nobody listens on, from `first + offset` on and around within `PORTS` ports.

    The offset, a replica's rank on its node, keeps replicas that start at the same moment apart. It alone
    would not do, since Ray renumbers running replicas when others go.
    """
    candidates = [first + (offset + step) % PORTS for step in range(PORTS)]
    for port in candidates:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise ConfigError(f"no free operations port on {host} from {first} to {first + PORTS - 1}")


Medusa = serve.deployment(name="Medusa")(serve.ingress()(Replica))
app = Medusa.bind()
