"""One worker process, seen from the API process: start, send, receive, kill."""

import asyncio
import contextlib
import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import msgspec

from medusa_core.model_info import ModelInfo
from medusa_core.request import Request
from server.workers.frames import FrameReader
from server.workers.messages import (
    Abort,
    Command,
    Event,
    Loading,
    Ready,
    Rejected,
    Shutdown,
    Step,
    Submit,
    decode_event,
    encode,
)
from server.workers.worker import WorkerConfig, worker_main

logger = logging.getLogger(__name__)

REAP_SECONDS = 0.02  # between looks whether a process that closes down is gone
STOP_SECONDS = 5.0  # a worker told to leave is killed after this

_context = multiprocessing.get_context("spawn")


class WorkerProcess:
    """A spawned worker and its two pipes. All methods are for the event loop's thread and do not block."""

    def __init__(
        self,
        config: WorkerConfig,
        generation: int,
        on_event: Callable[["WorkerProcess", Event], None],
        on_exit: Callable[["WorkerProcess"], None],
    ) -> None:
        self.generation = generation
        self.pid: int | None = None
        self.info: ModelInfo | None = None
        self.stage = "starting"  # what it loads, until `info` is there
        self.last_progress = time.monotonic()
        self._config = config
        self._on_event = on_event
        self._on_exit = on_exit
        self._running: set[str] = set()
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._exited = asyncio.Event()
        self.exit_code: int | None = None  # while it runs

    @property
    def slots(self) -> int:
        """Requests it takes at once; 0 while it loads."""
        return 0 if self.info is None else self.info.slots

    @property
    def num_free(self) -> int:
        return self.slots - len(self._running)

    @property
    def is_busy(self) -> bool:
        return bool(self._running)

    def start(self) -> None:
        """Spawn the process and listen to it. Raises `OSError` if the system has no room for one."""
        self._loop = asyncio.get_running_loop()
        child_commands, self._commands = _context.Pipe(duplex=False)
        self._events, child_events = _context.Pipe(duplex=False)
        self._process = _context.Process(
            target=worker_main,
            args=(self._config, self.generation, child_commands, child_events),
            name=f"medusa-worker-{self.generation}",
        )
        try:
            self._process.start()
            self.pid = self._process.pid
        finally:
            # Ours must be the only ends left here, else neither side would ever see the other's end of file.
            child_commands.close()
            child_events.close()
        self._reader = FrameReader(self._events)
        self._loop.add_reader(self._events.fileno(), self._receive)
        self._loop.add_reader(self._process.sentinel, self._handle_exit)
        writer = threading.Thread(
            target=_write_all, args=(self._outgoing, self._commands), name="worker-writer", daemon=True
        )
        writer.start()

    def submit(self, request: Request) -> None:
        """Hand a request to a free slot."""
        if not self._running:
            self.last_progress = time.monotonic()
        self._running.add(request.request_id)
        self._send(Submit(request))

    def abort(self, request_id: str) -> None:
        """Free the request's slot; a request that has left already is ignored."""
        if request_id in self._running:
            self._running.remove(request_id)
            self._send(Abort(request_id))

    def poll_events(self) -> None:
        """Take in what has arrived: before judging progress, and before declaring requests lost."""
        with contextlib.suppress(EOFError, OSError, msgspec.DecodeError):
            while not self._events.closed and self._reader.fill():
                self._handle_frames()

    def kill(self) -> None:
        """SIGKILL; `on_exit` follows from the event loop."""
        if not self._exited.is_set() and self._process.is_alive():
            self._process.kill()

    async def stop(self) -> None:
        """Ask the worker to leave, and insist after `STOP_SECONDS`; one that still loads would not listen."""
        if self.info is None:
            self.kill()
        self._send(Shutdown())
        try:
            await asyncio.wait_for(self._exited.wait(), STOP_SECONDS)
        except TimeoutError:
            self.kill()
            await self._exited.wait()

    def _send(self, command: Command) -> None:
        # A writer thread, because a prompt may exceed what the pipe takes while the worker is in a step.
        # Commands come once or twice a request, so the hop costs nothing that matters.
        self._outgoing.put(encode(command))

    def _receive(self) -> None:
        try:
            self._reader.fill()
            self._handle_frames()
        except (EOFError, OSError):
            self._loop.remove_reader(self._events.fileno())  # the sentinel tells the rest
        except msgspec.DecodeError:
            logger.exception("worker %d sent an unreadable event and is killed", self.generation)
            self._loop.remove_reader(self._events.fileno())
            self.kill()

    def _handle_frames(self) -> None:
        for frame in self._reader.frames():
            self._handle(decode_event(frame))

    def _handle(self, event: Event) -> None:
        match event:
            case Loading(stage=stage):
                self.stage = stage
                self.last_progress = time.monotonic()
            case Ready(info=info):
                self.info = info
            case Step(output=output):
                self.last_progress = time.monotonic()
                if output is not None and output.finish_reason is not None:
                    self._running.discard(output.request_id)
            case Rejected(request_id=request_id):
                self._running.discard(request_id)
        self._on_event(self, event)

    def _handle_exit(self) -> None:
        self._loop.remove_reader(self._process.sentinel)
        self.poll_events()  # its last words
        self._loop.remove_reader(self._events.fileno())
        self._events.close()
        self._outgoing.put(None)
        self._reap()

    def _reap(self) -> None:
        # The sentinel tells that its files are closed. A driver may take a while longer to give up a GPU's
        # memory, which the other workers' streams must not wait for.
        self._process.join(0)
        self.exit_code = self._process.exitcode
        if self.exit_code is None:
            self._loop.call_later(REAP_SECONDS, self._reap)
            return
        # Two descriptors, which would stay open as long as an ended job remembers this worker.
        self._process.close()
        self._exited.set()
        self._on_exit(self)


def _write_all(outgoing: "queue.SimpleQueue[bytes | None]", connection: Connection) -> None:
    with connection, contextlib.suppress(BrokenPipeError):
        while (frame := outgoing.get()) is not None:
            connection.send_bytes(frame)
