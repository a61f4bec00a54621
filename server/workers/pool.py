"""All workers: one for each device, a watchdog over them, and what is known of the model they serve."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence

from medusa_core.errors import MedusaError
from server.observability.metrics import ServerMetrics
from server.workers.supervisor import PoolPolicy, Replica, ServedModel, WorkerListener
from server.workers.worker import WorkerConfig


class WorkerStartError(MedusaError):
    """A worker could not load its model when the server started."""


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

    @property
    def has_one_worker(self) -> bool:
        return len(self._replicas) == 1

    @property
    def num_slots(self) -> int:
        """Slots of all workers that are ready."""
        return sum(replica.worker.slots for replica in self._replicas if replica.worker and replica.is_ready)

    def count_states(self) -> Counter[str]:
        """How many workers are starting, ready, failed."""
        return Counter(replica.state for replica in self._replicas)

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
        if any(replica.is_ready and not replica.is_stalled for replica in self._replicas):
            return None
        if any(replica.is_ready for replica in self._replicas):
            return "the worker has made no progress lately"
        reasons = [replica.given_up for replica in self._replicas if replica.given_up]
        if len(reasons) == len(self._replicas):
            return reasons[0]
        stages = [replica.stage for replica in self._replicas if not replica.given_up]
        return f"the worker is starting: {stages[0]}"

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
        interval = min(1.0, self.policy.stall_timeout / 4, self.policy.load_timeout / 4)
        while True:
            await asyncio.sleep(interval)
            for replica in self._replicas:
                if replica.is_stalled:
                    replica.kill_stalled()
