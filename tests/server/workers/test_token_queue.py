"""The token queue: batches for a reader that lags, one end, no lost wake-up."""

import asyncio

from medusa_core.engine.outputs import FinishReason, StepOutput
from server import errors
from server.errors import ApiError
from server.workers.token_queue import TokenQueue


def run(coroutine):
    async def limited():
        async with asyncio.timeout(10):
            return await coroutine

    return asyncio.run(limited())


def step(*token_ids):
    return StepOutput(request_id="a", token_ids=token_ids)


async def take(queue):
    outputs, end = await queue.take()
    return [token for output in outputs for token in output.token_ids], end


def test_what_gathered_comes_in_one_batch():
    async def go():
        queue = TokenQueue()
        queue.put(step(1, 2))
        queue.put(step())
        queue.put(step(3))
        assert await take(queue) == ([1, 2, 3], None)
        queue.put(step(4))
        queue.close(FinishReason.STOP)
        assert await take(queue) == ([4], FinishReason.STOP)
        assert await take(queue) == ([], FinishReason.STOP)

    run(go())


def test_a_waiting_reader_is_woken():
    async def go():
        queue = TokenQueue()
        reader = asyncio.create_task(take(queue))
        await asyncio.sleep(0)
        queue.put(step(7))
        queue.put(step(8))
        assert await reader == ([7, 8], None)
        reader = asyncio.create_task(take(queue))
        await asyncio.sleep(0)
        queue.close(FinishReason.LENGTH)
        assert await reader == ([], FinishReason.LENGTH)

    run(go())


def test_there_is_one_end():
    queue = TokenQueue()
    queue.close(errors.worker_lost())
    queue.close(FinishReason.STOP)
    queue.put(step(1))
    tokens, end = run(take(queue))
    assert tokens == []
    assert isinstance(end, ApiError)


def test_a_cancelled_reader_leaves_the_queue_usable():
    async def go():
        queue = TokenQueue()
        reader = asyncio.create_task(take(queue))
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        queue.put(step(1))
        assert await take(queue) == ([1], None)

    run(go())


def test_batches_keep_their_distance_and_the_end_does_not_wait():
    async def go():
        queue = TokenQueue(interval=1000.0)
        queue.put(step(1))
        assert await take(queue) == ([1], None), "the first batch comes at once"
        queue.put(step(2))
        reader = asyncio.create_task(take(queue))
        await asyncio.sleep(0.02)
        queue.put(step(3))
        await asyncio.sleep(0.02)
        assert not reader.done()
        queue.close(FinishReason.STOP)
        assert await reader == ([2, 3], FinishReason.STOP)

    run(go())


def test_a_batch_comes_after_the_interval():
    async def go():
        queue = TokenQueue(interval=0.02)
        queue.put(step(1))
        await take(queue)
        reader = asyncio.create_task(take(queue))
        await asyncio.sleep(0)
        queue.put(step(2))
        queue.put(step(3))
        assert await reader == ([2, 3], None)

    run(go())
