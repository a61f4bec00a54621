"""A client that stops reading: the response ends, whichever of its two senders notices."""

import asyncio
import time

from server.pipeline.streaming import ChatStream


async def frames():
    while True:
        yield b"data: x\n\n"


async def wait_for_ever(*args):
    await asyncio.Event().wait()


def test_a_frame_and_a_keep_alive_that_time_out_together(caplog):
    """Both raise before either can cancel the other, and what comes out is a group."""
    stuck = []
    closed = []

    async def send(message):
        if message["type"] == "http.response.body":
            stuck.append(message)
            if len(stuck) == 2:  # past the deadlines of both
                asyncio.get_running_loop().call_soon(time.sleep, 0.6)
            await wait_for_ever()

    stream = ChatStream(frames(), on_close=lambda: closed.append(1), keepalive=0.05, send_timeout=0.3)
    asyncio.run(asyncio.wait_for(stream({"type": "http", "method": "POST"}, wait_for_ever, send), 20))
    assert len(stuck) == 2
    assert closed == [1]
    assert caplog.text.count("a client left its stream unread") == 1
