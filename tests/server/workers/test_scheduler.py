"""The scheduler with workers that only take notes: order, limits, and one end for every request."""

import asyncio

import pytest

from medusa_core.engine.outputs import FinishReason, StepOutput, StepStats
from medusa_core.sampling_params import SpeculationMode
from server.errors import ApiError
from server.workers.scheduler import JobState


def test_first_come_first_served(bench):
    async def scenario(scheduler):
        worker = bench.Worker()
        scheduler.worker_ready(worker)
        jobs = [bench.submit(scheduler, name) for name in "abc"]
        assert worker.running == ["a"]
        assert [job.state for job in jobs] == [JobState.RUNNING, JobState.WAITING, JobState.WAITING]
        bench.finish(scheduler, worker, "a", 5)
        assert worker.running == ["b"]
        assert await bench.taken(jobs[0]) == ([5], FinishReason.STOP)
        bench.finish(scheduler, worker, "b")
        assert worker.running == ["c"]

    bench.run(scenario)


def test_full_queue_is_a_429_and_counted(bench):
    async def scenario(scheduler):
        scheduler.worker_ready(bench.Worker())
        for name in "abc":
            bench.submit(scheduler, name)
        with pytest.raises(ApiError) as caught:
            bench.submit(scheduler, "d")
        assert caught.value.status == 429
        assert caught.value.headers["retry-after"] == "1"
        assert scheduler.num_waiting == 2

    bench.run(scenario)


def test_queue_limit_0_takes_what_finds_a_slot(bench):
    async def scenario(scheduler):
        scheduler.worker_ready(bench.Worker(slots=2))
        bench.submit(scheduler, "a")
        bench.submit(scheduler, "b")
        with pytest.raises(ApiError):
            bench.submit(scheduler, "c")

    bench.run(scenario, queue_limit=0)


def test_requests_wait_for_a_worker_and_spread_over_several(bench):
    async def scenario(scheduler):
        for name in "ab":
            bench.submit(scheduler, name)
        assert scheduler.num_waiting == 2
        first, second = bench.Worker(slots=2), bench.Worker(slots=2)
        scheduler.worker_ready(first)
        assert first.running == ["a", "b"]
        scheduler.worker_ready(second)
        bench.submit(scheduler, "c")
        assert second.running == ["c"]

    bench.run(scenario)


def test_canceling_frees_queue_and_slot(bench):
    async def scenario(scheduler):
        worker = bench.Worker()
        scheduler.worker_ready(worker)
        running, waiting, last = (bench.submit(scheduler, name) for name in "abc")
        scheduler.cancel(waiting)
        assert scheduler.num_waiting == 1
        scheduler.cancel(running)
        scheduler.cancel(running)
        assert worker.aborted == ["a"]
        assert worker.running == ["c"]
        assert await bench.end_of(running) == FinishReason.ABORT
        assert last.state is JobState.RUNNING

    bench.run(scenario)


def test_lost_worker_fails_its_requests_only(bench):
    async def scenario(scheduler):
        lost, other = bench.Worker(), bench.Worker()
        scheduler.worker_ready(lost)
        a = bench.submit(scheduler, "a")
        scheduler.worker_ready(other)
        b, c = bench.submit(scheduler, "b"), bench.submit(scheduler, "c")
        scheduler.worker_lost(lost)
        end = await bench.end_of(a)
        assert isinstance(end, ApiError)
        assert end.detail.code == "worker_lost"
        assert b.state is JobState.RUNNING
        assert c.state is JobState.WAITING
        replacement = bench.Worker()
        scheduler.worker_ready(replacement)
        assert replacement.running == ["c"]
        # A late word of the lost one changes nothing.
        scheduler.worker_output(lost, StepOutput(request_id="c", token_ids=(9,)))
        scheduler.worker_rejected(lost, "c", "no", None)
        assert c.state is JobState.RUNNING

    bench.run(scenario)


def test_no_worker_left(bench):
    async def scenario(scheduler):
        job = bench.submit(scheduler, "a")
        scheduler.workers_gone()
        end = await bench.end_of(job)
        assert end.status == 503
        with pytest.raises(ApiError) as caught:
            bench.submit(scheduler, "b")
        assert caught.value.detail.code == "no_worker"

    bench.run(scenario)


def test_rejection_and_failure_end_one_request(bench):
    async def scenario(scheduler):
        worker = bench.Worker(slots=2)
        scheduler.worker_ready(worker)
        a, b = bench.submit(scheduler, "a"), bench.submit(scheduler, "b")
        worker.running.remove("a")
        scheduler.worker_rejected(worker, "a", "no such tree", "speculation.tree")
        end = await bench.end_of(a)
        assert (end.status, end.detail.param) == (400, "speculation.tree")
        worker.running.remove("b")
        failure = StepOutput(
            request_id="b", token_ids=(), finish_reason=FinishReason.ERROR, error="RuntimeError: secret"
        )
        scheduler.worker_output(worker, failure)
        end = await bench.end_of(b)
        assert end.status == 500
        assert "secret" not in end.detail.message
        assert end.headers["x-should-retry"] == "false"

    bench.run(scenario)


def test_deadline_of_waiting_and_running(bench, caplog):
    async def scenario(scheduler):
        worker = bench.Worker()
        scheduler.worker_ready(worker)
        running, waiting = bench.submit(scheduler, "a"), bench.submit(scheduler, "b")
        running.timer.cancel()  # else its end would hand the slot to the other just in time
        end = await bench.end_of(waiting)
        assert (end.status, end.detail.code) == (503, "queue_timeout")
        scheduler.expire(running)
        assert await bench.end_of(running) == FinishReason.LENGTH
        assert worker.aborted == ["a"]
        assert [record.completion_id for record in caplog.records] == ["b", "a"]
        assert "cut short" in caplog.text

    bench.run(scenario, request_timeout=0.02)


def test_idle_is_waited_for(bench):
    async def scenario(scheduler):
        await scheduler.wait_idle()
        job = bench.submit(scheduler, "a")
        waiter = asyncio.create_task(scheduler.wait_idle())
        await asyncio.sleep(0)
        assert not waiter.done()
        scheduler.cancel(job)
        await waiter

    bench.run(scenario)


def test_steps_are_counted_for_metrics_and_handed_on_whole(bench):
    async def scenario(scheduler):
        worker = bench.Worker()
        scheduler.worker_ready(worker)
        job = bench.submit(scheduler, "a")
        prefill = StepStats(mode=SpeculationMode.EXACT, is_prefill=True, seconds=0.1, prompt_tokens=3)
        decode = StepStats(
            mode=SpeculationMode.EXACT, is_prefill=False, seconds=0.03, drafted=(3, 2), accepted=(1, 1)
        )
        scheduler.worker_output(worker, StepOutput(request_id="a", token_ids=(1,), stats=prefill))
        scheduler.worker_output(worker, StepOutput(request_id="a", token_ids=(2, 3, 4), stats=decode))
        bench.finish(scheduler, worker, "a", 5, 6, stats=decode)
        sample = scheduler.metrics.registry.get_sample_value
        assert sample("medusa_decode_steps_total", {"mode": "exact"}) == 2
        assert sample("medusa_generation_tokens_total", {"mode": "exact"}) == 6
        outputs, end = await job.tokens.take()
        assert [output.stats for output in outputs] == [prefill, decode, decode]
        assert [output.token_ids for output in outputs] == [(1,), (2, 3, 4), (5, 6)]
        assert end == FinishReason.STOP

    bench.run(scenario)


def test_a_prompt_in_preparation_holds_a_place(bench):
    """Long prompts take a while to tokenize: they must not pile up in front of the queue, uncounted."""

    async def scenario(scheduler):
        scheduler.worker_ready(bench.Worker())
        with scheduler.preparing(), scheduler.preparing(), scheduler.preparing():  # a slot and two places
            with pytest.raises(ApiError) as caught, scheduler.preparing():
                raise AssertionError("there was room")
            assert caught.value.status == 429
        for name in "abc":
            with scheduler.preparing():
                pass
            bench.submit(scheduler, name)
        with pytest.raises(ApiError), scheduler.preparing():
            raise AssertionError("there was room")

    bench.run(scenario)


def test_out_of_memory_is_told_apart_and_counted(bench):
    async def scenario(scheduler):
        worker = bench.Worker()
        scheduler.worker_ready(worker)
        job = bench.submit(scheduler, "a")
        worker.running.remove("a")
        error = {"finish_reason": FinishReason.ERROR, "error": "CUDA out of memory", "out_of_memory": True}
        scheduler.worker_output(worker, StepOutput(request_id="a", token_ids=(), **error))
        end = await bench.end_of(job)
        assert (end.status, end.detail.code) == (503, "out_of_memory")
        assert end.headers["retry-after"]
        assert scheduler.metrics.registry.get_sample_value("medusa_out_of_memory_total") == 1

    bench.run(scenario)
