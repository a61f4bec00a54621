"""Length-prefixed frames over a pipe, written and read without ever blocking.

The format is that of `multiprocessing.Connection.send_bytes`, which writes the frames of a worker that loads.
"""

import os
import struct
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection

READ_BYTES = 16_384  # taken in at once; then other callbacks of the event loop have their turn

_LENGTH = struct.Struct("!i")


class FrameWriter:
    """Frames of any length for a reader that may be slow: what the pipe does not take waits here."""

    def __init__(self, connection: Connection) -> None:
        self._fd = connection.fileno()
        self._pending: deque[memoryview] = deque()
        os.set_blocking(self._fd, False)

    @property
    def has_backlog(self) -> bool:
        return bool(self._pending)

    def fileno(self) -> int:
        """The pipe's descriptor, to wait for room in it."""
        return self._fd

    def put(self, payload: bytes) -> None:
        self._pending.append(memoryview(_LENGTH.pack(len(payload)) + payload))
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes. Raises `BrokenPipeError` when the reader is gone."""
        while self._pending:
            try:
                written = os.write(self._fd, self._pending[0])
            except BlockingIOError:
                return
            rest = self._pending[0][written:]
            if rest:
                self._pending[0] = rest
            else:
                self._pending.popleft()


class FrameReader:
    """Frames from a pipe, whose bytes may arrive in any pieces."""

    def __init__(self, connection: Connection) -> None:
        self._fd = connection.fileno()
        self._buffer = bytearray()
        os.set_blocking(self._fd, False)

    def fill(self) -> bool:
        """Take in at most `READ_BYTES`; False if nothing has arrived. Raises `EOFError` at the end."""
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            raise EOFError
        self._buffer += data
        return True

    def frames(self) -> Iterator[bytes]:
        """The payloads that have arrived whole; half a one waits for the rest of it."""
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield payload
