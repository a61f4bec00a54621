"""The queue: admits requests, hands each to a worker with a free slot, and ends every one exactly once.

All of it runs on the event loop's thread, so nothing here locks. Waiting requests live in this process only:
they survive the loss of a worker, and canceling one costs nothing.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto

from medusa_core.engine.outputs import FinishReason, StepOutput
from medusa_core.request import Request
from server import errors
from server.errors import ApiError
from server.observability.logging import COMPLETION_ID, REQUEST_ID
from server.observability.metrics import ServerMetrics
from server.observability.timeline import Timeline
from server.workers.process import WorkerProcess
from server.workers.token_queue import End, TokenQueue

logger = logging.getLogger(__name__)

CHUNK_INTERVAL = 0.008  # seconds between batches of a request's tokens


class JobState(Enum):
    """Where an accepted request is."""

    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


@dataclass(slots=True, eq=False)
class Job:
    """One accepted request; the scheduler alone changes it."""

    request: Request
    timeline: Timeline
    tokens: TokenQueue = field(default_factory=lambda: TokenQueue(CHUNK_INTERVAL))
    state: JobState = JobState.WAITING
    worker: WorkerProcess | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def log_ids(self) -> dict[str, str]:
        """For a log line about it that is written outside its own task."""
        client_id = self.request.client_id
        return {COMPLETION_ID: self.request.request_id} | ({REQUEST_ID: client_id} if client_id else {})


class Scheduler:
    """Owns every accepted request from admission to its end."""

    def __init__(
        self, *, queue_limit: int, request_timeout: float, metrics: ServerMetrics, max_marks: int = 0
    ) -> None:
        """`max_marks`: how many steps of a request its timeline remembers one by one."""
        self._queue_limit = queue_limit
        self._max_marks = max_marks
        self._request_timeout = request_timeout
        self.metrics = metrics
        self._waiting: dict[str, Job] = {}
        self._running: dict[str, Job] = {}
        self._workers: list[WorkerProcess] = []
        self._are_workers_gone = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_preparing = 0
        metrics.watch_queue(lambda: len(self._waiting), lambda: len(self._running))
        metrics.queue_limit.set(queue_limit)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def check_room(self) -> None:
        """Raise what a request that came now would be refused with: no worker (503), no room (429)."""
        if self._are_workers_gone:
            raise _no_worker()
        num_free = sum(worker.num_free for worker in self._workers)
        if len(self._waiting) + self._num_preparing >= self._queue_limit + num_free:
            self.metrics.observe_rejection()
            raise errors.queue_full()

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Hold a place in the queue while a prompt is tokenized, so that long ones cannot pile up before it.

        Raises like `check_room`.
        """
        self.check_room()
        self._num_preparing += 1
        try:
            yield
        finally:
            self._num_preparing -= 1

    def submit(self, request: Request) -> Job:
        """Accept a request, whose tokens get exactly one end. Raises like `check_room`."""
        self.check_room()
        job = Job(request, Timeline(max_marks=self._max_marks))
        job.timer = asyncio.get_running_loop().call_later(self._request_timeout, self.expire, job)
        self._waiting[request.request_id] = job
        self._idle.clear()
        self._dispatch()
        return job

    def cancel(self, job: Job) -> None:
        """The client has gone. Nothing happens to a job that has ended."""
        self._end(job, FinishReason.ABORT)

    def stop(self, job: Job) -> None:
        """A stop string was found in its text."""
        self._end(job, FinishReason.STOP)

    def expire(self, job: Job) -> None:
        """Its time is up: cut short what it has, or refuse it."""
        if job.state is JobState.RUNNING:
            logger.warning("cut short: the request ran into its timeout", extra=job.log_ids)
            self._end(job, FinishReason.LENGTH)
        else:
            logger.warning("refused: no slot within the request timeout", extra=job.log_ids)
            self._end(job, errors.unavailable("No slot became free in time.", "queue_timeout"))

    def fail_all(self, error: ApiError) -> None:
        """End everything, waiting and running."""
        for job in [*self._waiting.values(), *self._running.values()]:
            self._end(job, error)

    async def wait_idle(self) -> None:
        """Until no accepted request is left."""
        await self._idle.wait()

    # What workers report

    def worker_ready(self, worker: WorkerProcess) -> None:
        self._workers.append(worker)
        self._dispatch()

    def worker_output(self, worker: WorkerProcess, output: StepOutput) -> None:
        """Tokens of a step. What a request that has ended still gets is dropped."""
        if output.stats is not None:
            self.metrics.observe_step(output.stats, len(output.token_ids))
        job = self._running.get(output.request_id)
        if job is None or job.worker is not worker:
            return
        first_token_seconds = job.timeline.step(output)
        if first_token_seconds is not None:
            self.metrics.time_to_first_token.observe(first_token_seconds)
        job.tokens.put(output)
        match output.finish_reason:
            case None:
                pass
            case FinishReason.ERROR:
                logger.error("the request failed on the worker: %s", output.error, extra=job.log_ids)
                self._end(job, self._failure_of(output))
            case reason:
                self._end(job, reason)

    def worker_rejected(
        self, worker: WorkerProcess, request_id: str, message: str, param: str | None
    ) -> None:
        """The engine refused one request before its first step."""
        job = self._running.get(request_id)
        if job is not None and job.worker is worker:
            self._end(job, errors.invalid(message, param=param))

    def worker_lost(self, worker: WorkerProcess) -> None:
        """The worker is gone: its requests fail, since their text so far cannot be continued elsewhere."""
        if worker in self._workers:
            self._workers.remove(worker)
        for job in [job for job in self._running.values() if job.worker is worker]:
            self._end(job, errors.worker_lost())

    def workers_gone(self) -> None:
        """The pool has given up: there is nothing to wait for."""
        self._are_workers_gone = True
        self.fail_all(_no_worker())

    # Transitions

    def _dispatch(self) -> None:
        while self._waiting and self._workers:
            worker = max(self._workers, key=lambda w: w.num_free)
            if worker.num_free == 0:
                return
            job = self._waiting.pop(next(iter(self._waiting)))
            job.state, job.worker = JobState.RUNNING, worker
            self._running[job.request.request_id] = job
            self.metrics.queue_wait.observe(job.timeline.dispatch())
            worker.submit(job.request)

    def _end(self, job: Job, end: End) -> None:
        if job.state is JobState.ENDED:
            return
        was_running, job.state = job.state is JobState.RUNNING, JobState.ENDED
        request_id = job.request.request_id
        if job.timer is not None:
            job.timer.cancel()
        if was_running:
            del self._running[request_id]
            assert job.worker is not None
            job.worker.abort(request_id)
        else:
            del self._waiting[request_id]
        job.tokens.close(end)
        reason = FinishReason.ERROR if isinstance(end, ApiError) else end
        self.metrics.observe_end(reason, job.timeline.end(reason))
        if not self._waiting and not self._running:
            self._idle.set()
        self._dispatch()

    def _failure_of(self, output: StepOutput) -> ApiError:
        if not output.out_of_memory:
            return errors.generation_failed()
        self.metrics.out_of_memory.inc()
        return errors.out_of_memory()


def _no_worker() -> ApiError:
    return errors.unavailable("No worker is available.", "no_worker")
