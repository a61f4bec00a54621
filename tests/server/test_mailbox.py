"""The mailbox: batches for a reader that lags, one end, no lost wake-up."""

import asyncio

from medusa_core.request import FinishReason
from server import errors
from server.mailbox import Failed, Finished, Mailbox


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
