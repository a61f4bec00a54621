"""The scheduler with workers that only take notes: order, limits, and one end for every request."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_core.request import FinishReason, SamplingParams, SpeculationMode, StepOutput, StepStats
from server.errors import ApiError
from server.mailbox import Failed, Finished
from server.metrics import ServerMetrics
from server.scheduler import JobState, Scheduler

PARAMS = SamplingParams()


class NotingWorker:
    """Takes requests up to its slots, as a worker process does, and notes what it was told."""

    def __init__(self, slots=1):
        self.slots = slots
        self.running = []
        self.aborted = []

    @property
    def num_free(self):
        return self.slots - len(self.running)

    def submit(self, request_id, prompt_ids, params):
        assert self.num_free > 0
        self.running.append(request_id)

    def abort(self, request_id):
        if request_id in self.running:
            self.running.remove(request_id)
            self.aborted.append(request_id)


def make_scheduler(**changes):
    options = {"queue_limit": 2, "request_timeout": 60.0} | changes
    return Scheduler(**options, metrics=ServerMetrics())


def run(scenario, **options):
    async def go():
        async with asyncio.timeout(10):
            await scenario(make_scheduler(**options))

    asyncio.run(go())


def finish(scheduler, worker, request_id, *tokens, reason=FinishReason.STOP, stats=None):
    """A last output as a worker process reports it: its slot is free before anyone hears of it."""
    worker.running.remove(request_id)
    scheduler.worker_output(
        worker, StepOutput(request_id=request_id, token_ids=tokens, stats=stats, finish_reason=reason)
    )


async def end_of(job):
    return (await job.mailbox.take())[1]


def submit(scheduler, name):
    return scheduler.submit(name, [1, 2, 3], PARAMS)


def test_first_come_first_served():
    async def scenario(scheduler):
        worker = NotingWorker()
        scheduler.worker_ready(worker)
        jobs = [submit(scheduler, name) for name in "abc"]
        assert worker.running == ["a"]
        assert [job.state for job in jobs] == [JobState.RUNNING, JobState.WAITING, JobState.WAITING]
        finish(scheduler, worker, "a", 5)
        assert worker.running == ["b"]
        assert await jobs[0].mailbox.take() == ([5], Finished(FinishReason.STOP))
        finish(scheduler, worker, "b")
        assert worker.running == ["c"]

    run(scenario)


def test_full_queue_is_a_429_and_counted():
    async def scenario(scheduler):
        scheduler.worker_ready(NotingWorker())
        for name in "abc":
            submit(scheduler, name)
        with pytest.raises(ApiError) as caught:
            submit(scheduler, "d")
        assert caught.value.status == 429
        assert caught.value.headers["retry-after"] == "1"
        assert scheduler.num_waiting == 2

    run(scenario)


def test_queue_limit_0_takes_what_finds_a_slot():
    async def scenario(scheduler):
        scheduler.worker_ready(NotingWorker(slots=2))
        submit(scheduler, "a")
        submit(scheduler, "b")
        with pytest.raises(ApiError):
            submit(scheduler, "c")

    run(scenario, queue_limit=0)


def test_requests_wait_for_a_worker_and_spread_over_several():
    async def scenario(scheduler):
        for name in "ab":
            submit(scheduler, name)
        assert scheduler.num_waiting == 2
        first, second = NotingWorker(slots=2), NotingWorker(slots=2)
        scheduler.worker_ready(first)
        assert first.running == ["a", "b"]
        scheduler.worker_ready(second)
        submit(scheduler, "c")
        assert second.running == ["c"]

    run(scenario)


def test_cancelling_frees_queue_and_slot():
    async def scenario(scheduler):
        worker = NotingWorker()
        scheduler.worker_ready(worker)
        running, waiting, last = (submit(scheduler, name) for name in "abc")
        scheduler.cancel(waiting)
        assert scheduler.num_waiting == 1
        scheduler.cancel(running)
        scheduler.cancel(running)
        assert worker.aborted == ["a"]
        assert worker.running == ["c"]
        assert await end_of(running) == Finished(FinishReason.ABORT)
        assert last.state is JobState.RUNNING

    run(scenario)


def test_lost_worker_fails_its_requests_only():
    async def scenario(scheduler):
        lost, other = NotingWorker(), NotingWorker()
        scheduler.worker_ready(lost)
        a = submit(scheduler, "a")
        scheduler.worker_ready(other)
        b, c = submit(scheduler, "b"), submit(scheduler, "c")
        scheduler.worker_lost(lost)
        end = await end_of(a)
        assert isinstance(end, Failed)
        assert end.error.detail.code == "worker_lost"
        assert b.state is JobState.RUNNING
        assert c.state is JobState.WAITING
        replacement = NotingWorker()
        scheduler.worker_ready(replacement)
        assert replacement.running == ["c"]
        # A late word of the lost one changes nothing.
        scheduler.worker_output(lost, StepOutput(request_id="c", token_ids=(9,)))
        scheduler.worker_rejected(lost, "c", "no", None)
        assert c.state is JobState.RUNNING

    run(scenario)


def test_no_worker_left():
    async def scenario(scheduler):
        job = submit(scheduler, "a")
        scheduler.workers_gone()
        end = await end_of(job)
        assert end.error.status == 503
        with pytest.raises(ApiError) as caught:
            submit(scheduler, "b")
        assert caught.value.detail.code == "no_worker"

    run(scenario)


def test_rejection_and_failure_end_one_request():
    async def scenario(scheduler):
        worker = NotingWorker(slots=2)
        scheduler.worker_ready(worker)
        a, b = submit(scheduler, "a"), submit(scheduler, "b")
        worker.running.remove("a")
        scheduler.worker_rejected(worker, "a", "no such tree", "speculation.tree")
        end = await end_of(a)
        assert (end.error.status, end.error.detail.param) == (400, "speculation.tree")
        worker.running.remove("b")
        failure = StepOutput(
            request_id="b", token_ids=(), finish_reason=FinishReason.ERROR, error="RuntimeError: secret"
        )
        scheduler.worker_output(worker, failure)
        end = await end_of(b)
        assert end.error.status == 500
        assert "secret" not in end.error.detail.message
        assert end.error.headers["x-should-retry"] == "false"

    run(scenario)


def test_deadline_of_waiting_and_running(caplog):
    async def scenario(scheduler):
        worker = NotingWorker()
        scheduler.worker_ready(worker)
        running, waiting = submit(scheduler, "a"), submit(scheduler, "b")
        running.timer.cancel()  # else its end would hand the slot to the other just in time
        end = await end_of(waiting)
        assert (end.error.status, end.error.detail.code) == (503, "queue_timeout")
        scheduler._expire(running)
        assert await end_of(running) == Finished(FinishReason.LENGTH)
        assert worker.aborted == ["a"]
        assert "a cut short" in caplog.text

    run(scenario, request_timeout=0.02)


def test_idle_is_waited_for():
    async def scenario(scheduler):
        await scheduler.wait_idle()
        job = submit(scheduler, "a")
        waiter = asyncio.create_task(scheduler.wait_idle())
        await asyncio.sleep(0)
        assert not waiter.done()
        scheduler.cancel(job)
        await waiter

    run(scenario)


def test_steps_are_counted_for_usage_and_metrics():
    async def scenario(scheduler):
        worker = NotingWorker()
        scheduler.worker_ready(worker)
        job = submit(scheduler, "a")
        prefill = StepStats(mode=SpeculationMode.EXACT, is_prefill=True, seconds=0.1, prompt_tokens=3)
        decode = StepStats(
            mode=SpeculationMode.EXACT, is_prefill=False, seconds=0.03, drafted=(3, 2), accepted=(1, 1)
        )
        scheduler.worker_output(worker, StepOutput(request_id="a", token_ids=(1,), stats=prefill))
        scheduler.worker_output(worker, StepOutput(request_id="a", token_ids=(2, 3, 4), stats=decode))
        # The end of sequence was the third of the run: two tokens, but the step decided three.
        finish(scheduler, worker, "a", 5, 6, stats=decode)
        assert (job.decode_steps, job.decode_tokens) == (2, 6)
        assert await job.mailbox.take() == ([1, 2, 3, 4, 5, 6], Finished(FinishReason.STOP))

    run(scenario)


class Story:
    """A scheduler with workers and jobs that hypothesis moves about."""

    def __init__(self, scheduler, slots):
        self.scheduler, self.slots = scheduler, slots
        self.workers, self.jobs = [], []

    def submit(self, _):
        with contextlib.suppress(ApiError):
            self.jobs.append(submit(self.scheduler, f"r{len(self.jobs)}"))

    def ready(self, _):
        self.workers.append(NotingWorker(self.slots))
        self.scheduler.worker_ready(self.workers[-1])

    def kill(self, number):
        if self.workers:
            self.scheduler.worker_lost(self.workers.pop(number % len(self.workers)))

    def finish(self, number):
        busy = [worker for worker in self.workers if worker.running]
        if busy:
            worker = busy[number % len(busy)]
            finish(self.scheduler, worker, worker.running[0], 1)

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
            self.scheduler._expire(alive[number % len(alive)])

    def _with_job(self, number, act):
        if self.jobs:
            act(self.jobs[number % len(self.jobs)])


ACTIONS = ["submit", "finish", "cancel", "stop", "kill", "ready", "expire", "fail_all"]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3), st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 7))))
def test_every_accepted_request_ends_exactly_once(slots, actions):
    """Whatever happens in whatever order: slots are never overrun, and each mailbox gets one end."""

    async def scenario(scheduler):
        story = Story(scheduler, slots)
        for action, number in actions:
            getattr(story, action)(number)
        on_workers = [name for worker in story.workers for name in worker.running]
        running = [job.request_id for job in story.jobs if job.state is JobState.RUNNING]
        assert sorted(on_workers) == sorted(running)
        story.fail_all(0)
        await scheduler.wait_idle()
        for job in story.jobs:
            assert job.state is JobState.ENDED
            assert await end_of(job) is not None
            assert job.timer.cancelled()
        sample = scheduler._metrics.registry.get_sample_value
        reasons = ("stop", "length", "abort", "error")
        ends = [sample("medusa_requests_total", {"finish_reason": reason}) for reason in reasons]
        assert sum(ends) == len(story.jobs)

    run(scenario)
