"""The worker process: owns the engine, obeys commands from one pipe and reports events through another.

It ignores SIGINT, SIGTERM and SIGHUP, which go to the whole process group, and leaves on a `Shutdown`, when
the command pipe ends, or when the parent is gone. An engine error that is not one request's own ends the
process, since its state is unknown then.
"""

import logging
import os
import select
import signal
import sys
import threading
from dataclasses import dataclass, replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from medusa_core.config import EngineConfig
from medusa_core.errors import ConfigError, MedusaError, TreeError
from medusa_core.model_info import ModelInfo
from medusa_core.request import Request
from server.observability.logging import LogFormat, adopt_libraries, configure_logging
from server.workers.frames import FrameWriter
from server.workers.messages import (
    Abort,
    Command,
    Event,
    Loading,
    Ready,
    Rejected,
    Shutdown,
    StartFailed,
    Step,
    Submit,
    clip,
    decode_command,
    encode,
)

if TYPE_CHECKING:
    from medusa_core.engine.engine import Engine

logger = logging.getLogger(__name__)

START_FAILED_EXIT = 3
UPKEEP_MILLISECONDS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What a worker needs to start. `heads` None: those found beside the model; "none": none.

    `num_workers`: how many there are; those on the CPU share its cores.
    """

    model: str
    heads: str | None
    engine: EngineConfig
    log_level: str
    log_format: LogFormat = "text"
    num_workers: int = 1


class WorkerLoop:
    """Commands in, steps out, until told to leave."""

    def __init__(
        self,
        engine: "Engine",
        commands: Connection,
        outbox: FrameWriter,
        client_ids: dict[str, str],
    ) -> None:
        """`client_ids`: kept up to date, by completion id, for as long as a request is here."""
        self._engine = engine
        self._client_ids = client_ids
        self._commands = commands
        self._outbox = outbox
        self._readable = select.poll()
        self._readable.register(commands.fileno(), select.POLLIN)
        self._any = select.poll()
        self._any.register(commands.fileno(), select.POLLIN)
        self._any.register(outbox.fileno(), select.POLLOUT)

    def run(self) -> None:
        """Returns on `Shutdown`; raises `EOFError` or `BrokenPipeError` when the API process is gone."""
        while True:
            if not self._engine.has_work:
                self._sleep()
                self._engine.upkeep()
            while self._readable.poll(0):
                command = decode_command(self._commands.recv_bytes())
                if isinstance(command, Shutdown):
                    return
                self._obey(command)
            if self._engine.has_work:
                self._step()
            self._outbox.flush()

    def _sleep(self) -> None:
        """Until there is a command, room in the pipe for what is left to send, or time for upkeep."""
        poll = self._any if self._outbox.has_backlog else self._readable
        poll.poll(UPKEEP_MILLISECONDS if self._engine.is_compiling else None)

    def _step(self) -> None:
        outputs = self._engine.step()
        for output in outputs:
            if output.finish_reason is not None:
                self._client_ids.pop(output.request_id, None)
            if output.error is not None:
                output = replace(output, error=clip(output.error))
            self._tell(Step(output))
        if not outputs:
            self._tell(Step(None))

    def _tell(self, event: Event) -> None:
        self._outbox.put(encode(event))

    def _obey(self, command: Command) -> None:
        match command:
            case Submit(request=request):
                self._add(request)
            case Abort(request_id=request_id):
                self._engine.abort(request_id)
                self._client_ids.pop(request_id, None)
            case Shutdown():
                raise AssertionError("the loop handles Shutdown itself")

    def _add(self, request: Request) -> None:
        self._client_ids[request.request_id] = request.client_id
        try:
            self._engine.add(request)
        except MedusaError as error:
            del self._client_ids[request.request_id]
            self._tell(Rejected(request.request_id, clip(str(error)), _param(error)))


def worker_main(config: WorkerConfig, generation: int, commands: Connection, events: Connection) -> None:
    """Entry point of the process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    client_ids: dict[str, str] = {}
    configure_logging(config.log_level, config.log_format, worker=generation, client_ids=client_ids)
    _leave_with_parent()
    try:
        engine = _build_engine(config, events)
        outbox = FrameWriter(events)  # only now: what is told while it loads may block
        outbox.put(encode(Ready(_clipped(engine.info))))
        engine.compile_behind()
        WorkerLoop(engine, commands, outbox, client_ids).run()
    except (EOFError, BrokenPipeError):
        logger.debug("worker %d leaves: the API process is gone", generation)
    except Exception:  # multiprocessing would print it past the log
        logger.critical("worker %d ends by an error", generation, exc_info=True)
        sys.exit(1)


def _build_engine(config: WorkerConfig, events: Connection) -> "Engine":
    """The engine, or no return: a failure is reported as an event and ends the process."""

    def tell(stage: str) -> None:
        events.send_bytes(encode(Loading(clip(stage))))

    tell("importing libraries")
    if config.num_workers > 1:
        # Torch reads it when it is imported. Workers that each take all cores spin against each other.
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // config.num_workers)))
    # Only here: the API process imports this module, and must not import torch.
    from medusa_core.engine.engine import Engine

    adopt_libraries()

    try:
        return Engine.from_pretrained(config.model, heads=config.heads, config=config.engine, on_stage=tell)
    except (MedusaError, OSError, ValueError, RuntimeError, MemoryError) as error:
        logger.debug("the engine could not be built", exc_info=True)
        text = str(error) if isinstance(error, MedusaError) else f"{type(error).__name__}: {error}"
        events.send_bytes(encode(StartFailed(clip(f"cannot load {config.model}: {text}"))))
        sys.exit(START_FAILED_EXIT)


def _clipped(info: ModelInfo) -> ModelInfo:
    """With names that fit a log line: a path can have thousands of characters."""
    return replace(info, model=clip(info.model), heads=info.heads and clip(info.heads))


def _param(error: MedusaError) -> str | None:
    """The request's parameter an engine error is about, where its type tells."""
    if isinstance(error, TreeError):
        return "speculation.tree"
    return None if isinstance(error, ConfigError) else "messages"


def _leave_with_parent() -> None:
    """Watch the parent from a thread: it may die while the model loads or while a step runs for minutes."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
