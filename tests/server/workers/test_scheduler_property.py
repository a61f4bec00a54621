"""Every accepted request ends exactly once, whatever happens in whatever order."""

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import ApiError
from server.workers.scheduler import JobState


class Story:
    """A scheduler with workers and jobs that hypothesis moves about."""

    def __init__(self, bench, scheduler, slots):
        self.bench, self.scheduler, self.slots = bench, scheduler, slots
        self.workers, self.jobs = [], []

    def submit(self, _):
        with contextlib.suppress(ApiError):
            self.jobs.append(self.bench.submit(self.scheduler, f"r{len(self.jobs)}"))

    def ready(self, _):
        self.workers.append(self.bench.Worker(self.slots))
        self.scheduler.worker_ready(self.workers[-1])

    def kill(self, number):
        if self.workers:
            self.scheduler.worker_lost(self.workers.pop(number % len(self.workers)))

    def finish(self, number):
        busy = [worker for worker in self.workers if worker.running]
        if busy:
            worker = busy[number % len(busy)]
            self.bench.finish(self.scheduler, worker, worker.running[0], 1)

    def fail_all(self, _):
        self.scheduler.fail_all(ApiError(503, "down"))

    def cancel(self, number):
        self._with_job(number, self.scheduler.cancel)

    def stop(self, number):
        self._with_job(number, self.scheduler.stop)

    def expire(self, number):
        # The timer of an ended job is cancelled, so it cannot expire.
        alive = [job for job in self.jobs if job.state is not JobState.ENDED]
        if alive:
            self.scheduler.expire(alive[number % len(alive)])

    def _with_job(self, number, act):
        if self.jobs:
            act(self.jobs[number % len(self.jobs)])


ACTIONS = ["submit", "finish", "cancel", "stop", "kill", "ready", "expire", "fail_all"]


@settings(max_examples=80, deadline=None)
@given(slots=st.integers(1, 3), actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 7))))
def test_every_accepted_request_ends_exactly_once(bench, slots, actions):
    """Whatever happens in whatever order: slots are never overrun, and each queue of tokens gets one end."""

    async def scenario(scheduler):
        story = Story(bench, scheduler, slots)
        for action, number in actions:
            getattr(story, action)(number)
        on_workers = [name for worker in story.workers for name in worker.running]
        running = [job.request.request_id for job in story.jobs if job.state is JobState.RUNNING]
        assert sorted(on_workers) == sorted(running)
        story.fail_all(0)
        await scheduler.wait_idle()
        for job in story.jobs:
            assert job.state is JobState.ENDED
            assert await bench.end_of(job) is not None
            assert job.timer.cancelled()
        sample = scheduler.metrics.registry.get_sample_value
        reasons = ("stop", "length", "abort", "error")
        ends = [sample("medusa_requests_total", {"finish_reason": reason}) for reason in reasons]
        assert sum(ends) == len(story.jobs)

    bench.run(scenario)
