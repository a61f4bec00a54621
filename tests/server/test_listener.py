"""The listening socket: what accepted connections inherit from it."""

import asyncio
import socket

import pytest

from medusa_core.errors import ConfigError
from server.sockets import SEND_BUFFER, bind


def test_accepted_connections_send_at_once_and_buffer_little() -> None:
    """Without TCP_NODELAY a stream's second chunk waits 40 ms for the first one's acknowledgement."""

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
