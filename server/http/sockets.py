"""Listening sockets."""

import errno
import socket
from typing import Any

from medusa_core.errors import ConfigError

BACKLOG = 2048
SEND_BUFFER = 64 * 1024  # bytes the kernel holds for a client that does not read (Linux doubles it)

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener(socket.socket):
    """Says once that there are no file descriptors left, where asyncio would ask `BACKLOG` times a second.

    It logs each refusal with its traceback: megabytes a second, and no time left for those who are connected.
    """

    _is_exhausted = False

    def accept(self) -> tuple[socket.socket, Any]:
        if self._is_exhausted:
            self._is_exhausted = False
            raise BlockingIOError  # "nobody is waiting": asyncio comes back after its pause
        try:
            return super().accept()
        except OSError as error:
            self._is_exhausted = error.errno in EXHAUSTED
            raise


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ConfigError` if the address is taken or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol named, as asyncio turns Nagle's algorithm off for such sockets only: otherwise the
        # second chunk of a stream waits for the client's delayed acknowledgment of the first, 40 ms.
        listener = Listener(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror}") from error
    except UnicodeError as error:  # a label of more than 63 characters, or none
        raise ConfigError(f"cannot listen on {host}: it is no host name") from error
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
