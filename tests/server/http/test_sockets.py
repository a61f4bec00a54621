"""The listening socket: what accepted connections inherit from it."""

import asyncio
import errno
import os
import resource
import select
import socket

import pytest

from medusa_core.errors import ConfigError
from server.http.sockets import SEND_BUFFER, bind


def test_accepted_connections_send_at_once_and_buffer_little() -> None:
    """Without TCP_NODELAY a stream's second chunk waits 40 ms for the first one's acknowledgment."""

    async def options() -> tuple[int, int]:
        seen: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            seen.set_result(
                (
                    accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
                    accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
                )
            )
            writer.close()

        listener = bind("127.0.0.1", 0)
        async with await asyncio.start_server(accept, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            result = await asyncio.wait_for(seen, 10)
            writer.close()
            await writer.wait_closed()
            return result

    no_delay, send_buffer = asyncio.run(options())
    assert no_delay != 0
    assert send_buffer <= 2 * SEND_BUFFER


def test_a_taken_port_is_one_line() -> None:
    taken = bind("127.0.0.1", 0)
    with taken, pytest.raises(ConfigError, match="cannot listen on 127.0.0.1 port"):
        bind("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("host", ["..", "a" * 64 + ".example"])
def test_what_is_no_host_name_is_one_line(host: str) -> None:
    with pytest.raises(ConfigError, match="it is no host name"):
        bind(host, 0)


def test_without_descriptors_a_listener_asks_once_and_goes_on_later() -> None:
    """asyncio logs each failed `accept` with its traceback, as often as the backlog is long."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        assert select.select([listener], [], [], 10)[0]
        listener.setblocking(False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                listener.accept()
            with pytest.raises(BlockingIOError):
                listener.accept()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        accepted, _ = listener.accept()
        accepted.close()
