"""Listening sockets."""

import socket

from medusa_core.errors import ConfigError

BACKLOG = 2048
SEND_BUFFER = 64 * 1024  # bytes the kernel holds for a client that does not read (Linux doubles it)


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
        # Connections inherit it. Left alone, the kernel lets the buffer grow to megabytes: whole answers fit
        # in, and nobody ever notices a client that has stopped reading.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener
