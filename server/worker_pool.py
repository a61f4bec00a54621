"""Keeps workers alive: starts one for each device, restarts the dead with back-off, kills the hung."""

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from medusa_core.errors import MedusaError
from medusa_core.request import SamplingParams, StepOutput
from server.messages import Event, ModelInfo, Ready, Rejected, StartFailed, Step
from server.metrics import ServerMetrics
from server.scheduler import WorkerPort
from server.worker import WorkerConfig
from server.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

FIRST_BACKOFF = 0.5  # seconds, doubled for each restart in a row without a completed step
MAX_BACKOFF = 30.0


class WorkerStartError(MedusaError):
    """A worker could not load its model when the server started."""


class WorkerListener(Protocol):
    """Who is told what workers do; the scheduler."""

    def worker_ready(self, worker: WorkerPort) -> None:
        """It takes requests."""

    def worker_output(self, worker: WorkerPort, output: StepOutput) -> None:
        """Tokens for one request."""

    def worker_rejected(self, worker: WorkerPort, request_id: str, message: str, param: str | None) -> None:
        """One request was refused."""

    def worker_lost(self, worker: WorkerPort) -> None:
        """It is gone, and what ran on it too."""

    def workers_gone(self) -> None:
        """No worker is left and none will come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPolicy:
    """`restart_limit`: restarts in a row without a completed step; `stall_timeout`: seconds a busy worker may
    be silent."""

    restart_limit: int
    stall_timeout: float


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the first worker said of its engine."""

    info: ModelInfo
    defaults: SamplingParams


class Replica:
    """The position of one worker: its current incarnation and the account of restarts."""

    def __init__(self, pool: "WorkerPool", config: WorkerConfig) -> None:
        self._pool = pool
        self._config = config
        self._restarts_in_row = 0
        self._timer: asyncio.TimerHandle | None = None
        self._failure = "the worker died"
        self.worker: WorkerProcess | None = None
        self.has_started = False  # a worker has been ready here at least once
        self.is_ready = False
        self.given_up: str | None = None  # why there will be no further restart

    def start(self) -> None:
        """Spawn the next incarnation."""
        self._timer = None
        self._failure = "the worker died"
        self.worker = WorkerProcess(
            self._config, self._pool.next_generation(), self._handle_event, self._handle_exit
        )
        try:
            self.worker.start()
        except OSError as error:
            self._failure = f"no worker process could be started: {error}"
            self._fail()

    def is_stalled(self, timeout: float) -> bool:
        """Whether requests are on the worker and no step has completed for `timeout` seconds."""
        worker = self.worker
        if worker is None or not self.is_ready or not worker.is_busy:
            return False
        if time.monotonic() - worker.last_progress <= timeout:
            return False
        worker.poll_events()  # the silence may have been this process's own
        return worker.is_busy and time.monotonic() - worker.last_progress > timeout

    def kill_stalled(self, timeout: float) -> None:
        assert self.worker is not None
        self._failure = f"the worker was killed after {timeout:g} s without a step"
        logger.error("%s", self._failure)
        self.is_ready = False
        self.worker.kill()

    def kill(self) -> None:
        self._cancel_restart()
        if self.worker is not None:
            self.worker.kill()

    async def stop(self) -> None:
        self._cancel_restart()
        if self.worker is not None:
            await self.worker.stop()

    def _cancel_restart(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _handle_event(self, worker: WorkerProcess, event: Event) -> None:
        listener = self._pool.listener
        match event:
            case Ready(info=info, defaults=defaults):
                self.has_started = self.is_ready = True
                self._pool.note_ready(ServedModel(info, defaults))
                listener.worker_ready(worker)
            case StartFailed(message=message):
                self._failure = message
            case Step(output=output):
                self._restarts_in_row = 0
                if output is not None:
                    listener.worker_output(worker, output)
            case Rejected(request_id=request_id, message=message, param=param):
                listener.worker_rejected(worker, request_id, message, param)

    def _handle_exit(self, worker: WorkerProcess) -> None:
        self.worker = None
        self.is_ready = False
        listener = self._pool.listener
        listener.worker_lost(worker)
        if self._pool.is_stopping:
            return
        # At the first start the failure ends the server with this very text; once is enough.
        level = logging.ERROR if self.has_started else logging.DEBUG
        logger.log(
            level, "worker %d ended (exit code %s): %s", worker.generation, worker.exit_code, self._failure
        )
        self._fail()

    def _fail(self) -> None:
        """Restart after a while, or never."""
        self.worker = None
        if not self.has_started:
            # Nothing has worked yet: a wrong setting, most likely, which a restart does not mend.
            self._give_up(self._failure)
        elif self._restarts_in_row >= self._pool.policy.restart_limit:
            self._give_up(
                f"{self._failure}; given up after {self._restarts_in_row} restarts without a completed step"
            )
        else:
            delay = min(MAX_BACKOFF, FIRST_BACKOFF * 2**self._restarts_in_row)
            self._restarts_in_row += 1
            self._pool.metrics.worker_restarts.inc()
            self._timer = asyncio.get_running_loop().call_later(delay, self.start)

    def _give_up(self, reason: str) -> None:
        self.given_up = reason
        logger.log(logging.ERROR if self.has_started else logging.DEBUG, "no further restart: %s", reason)
        self._pool.note_given_up()


class WorkerPool:
    """All replicas, a watchdog over them, and what is known of the model they serve."""

    def __init__(
        self,
        configs: Sequence[WorkerConfig],
        policy: PoolPolicy,
        listener: WorkerListener,
        metrics: ServerMetrics,
    ) -> None:
        self.policy = policy
        self.listener = listener
        self.metrics = metrics
        self.is_stopping = False
        self._generations = itertools.count(1)
        self._replicas = [Replica(self, config) for config in configs]
        self._served: asyncio.Future[ServedModel] | None = None
        self._watchdog: asyncio.Task[None] | None = None

    async def start(self) -> ServedModel:
        """Start every worker and wait for the first to be ready. Raises `WorkerStartError` if none can."""
        self._served = asyncio.get_running_loop().create_future()
        for replica in self._replicas:
            replica.start()
        self._watchdog = asyncio.create_task(self._watch(), name="worker-watchdog")
        return await self._served

    async def stop(self) -> None:
        """End every worker, politely first."""
        self.is_stopping = True
        if self._watchdog is not None:
            self._watchdog.cancel()
        await asyncio.gather(*(replica.stop() for replica in self._replicas))

    def kill(self) -> None:
        """End every worker at once."""
        self.is_stopping = True
        for replica in self._replicas:
            replica.kill()

    def why_not_ready(self) -> str | None:
        """None if a worker can serve: it is loaded, and if busy it has made progress lately."""
        timeout = self.policy.stall_timeout
        if any(replica.is_ready and not replica.is_stalled(timeout) for replica in self._replicas):
            return None
        if any(replica.is_ready for replica in self._replicas):
            return "the worker has made no progress lately"
        reasons = [replica.given_up for replica in self._replicas if replica.given_up]
        if len(reasons) == len(self._replicas):
            return reasons[0]
        return "the worker is starting"

    # For replicas

    def next_generation(self) -> int:
        return next(self._generations)

    def note_ready(self, served: ServedModel) -> None:
        if self._served is not None and not self._served.done():
            self._served.set_result(served)

    def note_given_up(self) -> None:
        if not all(replica.given_up for replica in self._replicas):
            return
        self.listener.workers_gone()
        if self._served is not None and not self._served.done():
            self._served.set_exception(WorkerStartError(self.why_not_ready()))

    async def _watch(self) -> None:
        timeout = self.policy.stall_timeout
        while True:
            await asyncio.sleep(min(1.0, timeout / 4))
            for replica in self._replicas:
                if replica.is_stalled(timeout):
                    replica.kill_stalled(timeout)
