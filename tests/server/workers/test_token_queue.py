"""The mailbox: batches for a reader that lags, one end, no lost wake-up."""

import asyncio

from medusa_core.engine.outputs import FinishReason
from server import errors
from server.workers.token_queue import Failed, Finished, Mailbox


def run(coroutine):
    async def limited():
        async with asyncio.timeout(10):
            return await coroutine

    return asyncio.run(limited())


def test_what_gathered_comes_in_one_batch():
    async def go():
        mailbox = Mailbox()
        mailbox.put((1, 2))
        mailbox.put(())
        mailbox.put((3,))
        assert await mailbox.take() == ([1, 2, 3], None)
        mailbox.put((4,))
        mailbox.close(Finished(FinishReason.STOP))
        assert await mailbox.take() == ([4], Finished(FinishReason.STOP))
        assert await mailbox.take() == ([], Finished(FinishReason.STOP))

    run(go())


def test_a_waiting_reader_is_woken():
    async def go():
        mailbox = Mailbox()
        reader = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        mailbox.put((7,))
        mailbox.put((8,))
        assert await reader == ([7, 8], None)
        reader = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        mailbox.close(Finished(FinishReason.LENGTH))
        assert await reader == ([], Finished(FinishReason.LENGTH))

    run(go())


def test_there_is_one_end():
    mailbox = Mailbox()
    assert mailbox.close(Failed(errors.worker_lost()))
    assert not mailbox.close(Finished(FinishReason.STOP))
    mailbox.put((1,))
    tokens, end = run(mailbox.take())
    assert tokens == []
    assert isinstance(end, Failed)


def test_a_cancelled_reader_leaves_the_mailbox_usable():
    async def go():
        mailbox = Mailbox()
        reader = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        mailbox.put((1,))
        assert await mailbox.take() == ([1], None)

    run(go())


def test_batches_keep_their_distance_and_the_end_does_not_wait():
    async def go():
        mailbox = Mailbox(interval=1000.0)
        mailbox.put((1,))
        assert await mailbox.take() == ([1], None), "the first batch comes at once"
        mailbox.put((2,))
        reader = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0.02)
        mailbox.put((3,))
        await asyncio.sleep(0.02)
        assert not reader.done()
        mailbox.close(Finished(FinishReason.STOP))
        assert await reader == ([2, 3], Finished(FinishReason.STOP))

    run(go())


def test_a_batch_comes_after_the_interval():
    async def go():
        mailbox = Mailbox(interval=0.02)
        mailbox.put((1,))
        await mailbox.take()
        reader = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        mailbox.put((2,))
        mailbox.put((3,))
        assert await reader == ([2, 3], None)

    run(go())
