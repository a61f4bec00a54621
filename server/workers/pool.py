"""All workers: one for each device, a watchdog over them, and what is known of the model they serve."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence

from medusa_core.errors import MedusaError
from medusa_core.model_info import ModelInfo
from server.observability.metrics import ServerMetrics
from server.settings import Settings
from server.workers.scheduler import Scheduler
from server.workers.supervisor import WorkerSupervisor
from server.workers.worker import WorkerConfig


class WorkerStartError(MedusaError):
    """A worker could not load its model when the server started."""


class WorkerPool:
    """All supervisors, a watchdog over them, and what is known of the model they serve."""

    def __init__(
        self,
        configs: Sequence[WorkerConfig],
        settings: Settings,
        scheduler: Scheduler,
        metrics: ServerMetrics,
    ) -> None:
        """Of the settings the limits of restarts and of patience are used."""
        self.settings, self.scheduler, self.metrics = settings, scheduler, metrics
        self.is_stopping = False
        self.generations = itertools.count(1)
        self.supervisors = [WorkerSupervisor(self, config) for config in configs]
        self._info: asyncio.Future[ModelInfo] | None = None
        self._watchdog: asyncio.Task[None] | None = None

    @property
    def has_one_worker(self) -> bool:
        return len(self.supervisors) == 1

    @property
    def num_slots(self) -> int:
        """Slots of all workers that are ready."""
        return sum(s.worker.slots for s in self.supervisors if s.is_ready and s.worker is not None)

    def count_states(self) -> Counter[str]:
        """How many workers are starting, ready, failed."""
        return Counter(supervisor.state for supervisor in self.supervisors)

    async def start(self) -> ModelInfo:
        """Start every worker and wait for the first to be ready. Raises `WorkerStartError` if none can."""
        self._info = asyncio.get_running_loop().create_future()
        for supervisor in self.supervisors:
            supervisor.start()
        self._watchdog = asyncio.create_task(self._watch(), name="worker-watchdog")
        return await self._info

    async def stop(self) -> None:
        """End every worker, politely first."""
        self.is_stopping = True
        if self._watchdog is not None:
            self._watchdog.cancel()
        await asyncio.gather(*(supervisor.stop() for supervisor in self.supervisors))

    def kill(self) -> None:
        """End every worker at once."""
        self.is_stopping = True
        for supervisor in self.supervisors:
            supervisor.kill()

    def why_not_ready(self) -> str | None:
        """None if a worker can serve: it is loaded, and if busy it has made progress lately."""
        if any(supervisor.is_ready and not supervisor.is_stalled for supervisor in self.supervisors):
            return None
        if any(supervisor.is_ready for supervisor in self.supervisors):
            return "the worker has made no progress lately"
        reasons = [supervisor.given_up for supervisor in self.supervisors if supervisor.given_up]
        if len(reasons) == len(self.supervisors):
            return reasons[0]
        stages = [supervisor.stage for supervisor in self.supervisors if not supervisor.given_up]
        return f"the worker is starting: {stages[0]}"

    # For supervisors

    def note_ready(self, info: ModelInfo) -> None:
        if self._info is not None and not self._info.done():
            self._info.set_result(info)

    def note_given_up(self) -> None:
        if not all(supervisor.given_up for supervisor in self.supervisors):
            return
        self.scheduler.workers_gone()
        if self._info is not None and not self._info.done():
            self._info.set_exception(WorkerStartError(self.why_not_ready()))

    async def _watch(self) -> None:
        interval = min(1.0, self.settings.stall_timeout / 4, self.settings.load_timeout / 4)
        while True:
            await asyncio.sleep(interval)
            for supervisor in self.supervisors:
                if supervisor.is_stalled:
                    supervisor.kill_stalled()
