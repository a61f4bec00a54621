"""Restarts a worker with back-off; detects hangs."""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.workers.messages import Event, Loading, Ready, Rejected, StartFailed, Step
from server.workers.process import WorkerProcess
from server.workers.worker import WorkerConfig

if TYPE_CHECKING:
    from server.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

FIRST_BACKOFF = 0.5  # seconds, doubled for each restart in a row without a completed step
MAX_BACKOFF = 30.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a worker process ended: `reason` for the metric (`RESTART_REASONS`), `text` for people."""

    reason: str = "crash"
    text: str = "the worker died"


class WorkerSupervisor:
    """Keeps one worker running: its current process, and how often it was restarted in a row."""

    def __init__(self, pool: "WorkerPool", config: WorkerConfig) -> None:
        self._pool = pool
        self._config = config
        self._restarts_in_row = 0
        self._timer: asyncio.TimerHandle | None = None
        self._failure = Failure()
        self.worker: WorkerProcess | None = None
        self.has_started = False  # a worker has been ready here at least once
        self.is_ready = False
        self.given_up: str | None = None  # why there will be no further restart

    def start(self) -> None:
        """Spawn the next process."""
        self._timer = None
        self._failure = Failure()
        self.worker = WorkerProcess(
            self._config, next(self._pool.generations), self._handle_event, self._handle_exit
        )
        try:
            self.worker.start()
        except OSError as error:
            self._failure = Failure("load", f"no worker process could be started: {error}")
            self._fail()

    @property
    def state(self) -> str:
        """One of `WORKER_STATES`."""
        if self.given_up is not None:
            return "failed"
        return "ready" if self.is_ready else "starting"

    @property
    def stage(self) -> str:
        """What a starting worker is doing."""
        if self.worker is None:
            return "waiting to be restarted"
        return self.worker.stage if self._failure == Failure() else self._failure.text

    @property
    def is_stalled(self) -> bool:
        """Whether it loads or has requests, and nothing has come of it for too long."""
        worker = self.worker
        if worker is None or self._failure != Failure() or self._silence() <= self._patience():
            return False  # one that has failed is on its way out
        worker.poll_events()  # the silence may have been this process's own
        return self._silence() > self._patience()

    def kill_stalled(self) -> None:
        assert self.worker is not None
        what = "a step" if self.is_ready else f"progress in loading ({self.worker.stage})"
        reason = "hang" if self.is_ready else "load"
        self._failure = Failure(reason, f"the worker was killed after {self._patience():g} s without {what}")
        logger.error("%s", self._failure.text)
        self.is_ready = False
        self.worker.kill()
        # Not only at its exit: a process that hangs inside a driver may not end for a long time.
        self._pool.scheduler.worker_lost(self.worker)

    def _silence(self) -> float:
        """Seconds without progress, as far as there was something to do."""
        if self.worker is None or (self.is_ready and not self.worker.is_busy):
            return 0.0
        return time.monotonic() - self.worker.last_progress

    def _patience(self) -> float:
        settings = self._pool.settings
        return settings.stall_timeout if self.is_ready else settings.load_timeout

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

    @property
    def _level(self) -> int:
        # At the first start of a lone worker its failure ends the server with this very text; once is enough.
        return logging.ERROR if self.has_started or not self._pool.has_one_worker else logging.DEBUG

    def _handle_event(self, worker: WorkerProcess, event: Event) -> None:
        scheduler = self._pool.scheduler
        match event:
            case Loading(stage=stage):
                logger.debug("worker %d: %s", worker.generation, stage)
            case Ready(info=info):
                self.has_started = self.is_ready = True
                self._pool.note_ready(info)
                scheduler.worker_ready(worker)
            case StartFailed(message=message):
                self._failure = Failure("load", message)
            case Step(output=output):
                self._restarts_in_row = 0
                if output is not None:
                    scheduler.worker_output(worker, output)
            case Rejected(request_id=request_id, message=message, param=param):
                scheduler.worker_rejected(worker, request_id, message, param)

    def _handle_exit(self, worker: WorkerProcess) -> None:
        self.worker = None
        self.is_ready = False
        self._pool.scheduler.worker_lost(worker)
        if self._pool.is_stopping:
            return
        what = f"worker {worker.generation} ended (exit code {worker.exit_code}): {self._failure.text}"
        logger.log(self._level, "%s", what)
        self._fail()

    def _fail(self) -> None:
        """Restart after a while, or never."""
        self.worker = None
        if not self.has_started:
            # Nothing has worked yet: a wrong setting, most likely, which a restart does not mend.
            self._give_up(self._failure.text)
        elif self._restarts_in_row >= self._pool.settings.restart_limit:
            count = self._restarts_in_row
            self._give_up(f"{self._failure.text}; given up after {count} restarts without a completed step")
        else:
            delay = min(MAX_BACKOFF, FIRST_BACKOFF * 2**self._restarts_in_row)
            self._restarts_in_row += 1
            self._pool.metrics.worker_restarts[self._failure.reason].inc()
            logger.warning("worker restart %d in %.1f s", self._restarts_in_row, delay)
            self._timer = asyncio.get_running_loop().call_later(delay, self.start)

    def _give_up(self, reason: str) -> None:
        self.given_up = reason
        logger.log(self._level, "no further restart: %s", reason)
        self._pool.note_given_up()
