"""Plain sockets for clients that no HTTP library would be: small buffers, slow reads, broken requests."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import h11

HOST = "127.0.0.1"
CHUNK = 65536
PATH = "/v1/chat/completions"


@dataclass(slots=True)
class WireAnswer:
    """What came back. `status` None: the connection ended without a response."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    is_whole: bool = False

    @property
    def payloads(self) -> list[str]:
        """The events of a stream."""
        lines = self.body.decode("utf-8", "replace").splitlines()
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


class Wire:
    """One connection, and h11 to take a response apart."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._parser = h11.Connection(h11.CLIENT)
        # Only the method matters for reading the response: what was sent may be no HTTP at all.
        self._parser.send(
            h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")])
        )
        self._parser.send(h11.EndOfMessage())
        self.answer = WireAnswer()

    async def send(self, content: bytes) -> bool:
        """False if the server had closed before all was sent, which it may once it has refused."""
        try:
            await self._loop.sock_sendall(self._socket, content)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def end_sending(self) -> None:
        """Half-close: the server sees the end of the request, or of a half one."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    async def read_some(self, size: int = CHUNK) -> bool:
        """Read once, at most `size` bytes; False when the response is whole or the connection has ended."""
        if self.answer.is_whole:
            return False
        try:
            data = await self._loop.sock_recv(self._socket, size)
        except ConnectionResetError:
            return False
        try:
            self._parser.receive_data(data)
            self._take_events()
        except h11.RemoteProtocolError:
            return False  # cut off inside the response; `is_whole` tells
        return bool(data) and not self.answer.is_whole

    async def read_all(self) -> WireAnswer:
        while await self.read_some():
            pass
        return self.answer

    def _take_events(self) -> None:
        while True:
            event = self._parser.next_event()
            if isinstance(event, h11.Response):
                self.answer.status = event.status_code
                self.answer.headers = {
                    name.decode(): value.decode("latin-1") for name, value in event.headers
                }
            elif isinstance(event, h11.Data):
                self.answer.body += event.data
            elif isinstance(event, h11.EndOfMessage):
                self.answer.is_whole = True
                return
            elif not isinstance(event, h11.InformationalResponse):
                return  # more data is needed, or the connection is at its end


@contextlib.asynccontextmanager
async def connect(port: int, *, receive_buffer: int | None = None) -> AsyncIterator[Wire]:
    """A connection, closed at the end whatever was left unread."""
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (HOST, port))
        yield Wire(connection)


def request_bytes(
    body: bytes,
    *,
    method: str = "POST",
    path: str = PATH,
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """A request with its length declared, unless `headers` say otherwise (lower-case names)."""
    fields = {"host": HOST, "content-type": content_type, "content-length": str(len(body))} | dict(
        headers or {}
    )
    if "transfer-encoding" in fields:
        del fields["content-length"]
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body
