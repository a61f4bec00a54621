"""What must be gone once the clients are: requests, descriptors, threads; and every slot must work."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chaos.outcomes import Answer
from chaos.server_process import ServerProcess, open_children
from chaos.world import World, ask_stream

SETTLE_SECONDS = 30.0
FILL_TRIES = 6


@dataclass(frozen=True, slots=True)
class Level:
    """What an idle server holds."""

    fds: int
    threads: int


async def settle(server: ServerProcess, at_most: Level | None = None) -> tuple[Level, list[str]]:
    """Wait until nothing runs and no more is held than `at_most`; what is held then, and what is left."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        sample, metrics = server.sample(), await asyncio.to_thread(server.metrics)
        left = [
            f"{name} is {metrics[name]:g} with no client left"
            for name in ("medusa_running", "medusa_queue_depth")
            if metrics[name]
        ]
        if sample.zombies:
            left.append(f"{sample.zombies} zombies")
        if at_most is not None and sample.fds > at_most.fds:
            left.append(f"{sample.fds} open descriptors, {at_most.fds} before the load")
        if at_most is not None and sample.threads > at_most.threads:
            left.append(f"{sample.threads} threads, {at_most.threads} before the load")
        if not left or time.monotonic() > deadline:
            return Level(sample.fds, sample.threads), left
        await asyncio.sleep(0.5)


async def fill_slots(world: World, server: ServerProcess) -> str | None:
    """None if streams in all slots at once got text while none waited; else what happened instead."""
    slots = world.served.slots
    most = 0
    for _ in range(FILL_TRIES):  # an answer may be too short to meet the others
        streams = [asyncio.create_task(ask_stream(world, world.long_body())) for _ in range(slots)]
        try:
            most = max(most, await _most_running(server, streams, slots))
            answers = [answer for _, answer in await asyncio.gather(*streams)]
        finally:
            for stream in streams:
                stream.cancel()
        if most == slots and all(isinstance(answer, Answer) and answer.text for answer in answers):
            return None
    return f"at most {most} of {slots} slots were in use at once"


async def _most_running(server: ServerProcess, streams: Sequence["asyncio.Task[Any]"], slots: int) -> int:
    most = 0
    while not all(stream.done() for stream in streams):
        metrics = await asyncio.to_thread(server.metrics)
        if not metrics["medusa_queue_depth"]:
            most = max(most, int(metrics["medusa_running"]))
        if most == slots:
            break
        await asyncio.sleep(0.02)
    return most


async def end_politely(world: World, server: ServerProcess, drain_timeout: float) -> list[str]:
    """SIGTERM under load: accepted requests finish, the exit code is 0, no child is left."""
    children = server.workers()
    streams = [
        asyncio.create_task(ask_stream(world, world.long_body(max_tokens=100)))
        for _ in range(world.served.slots + 1)
    ]
    await asyncio.wait(streams, timeout=0.5)
    server.terminate()
    left: list[str] = []
    for result in await asyncio.gather(*streams, return_exceptions=True):
        if isinstance(result, BaseException):
            left.append(f"a stream during the drain: {type(result).__name__} {result}")
        elif result[1] is None:
            left.append(f"a stream during the drain ended with {result[0].detail!r}")
    code = await asyncio.to_thread(server.wait_exit, drain_timeout + SETTLE_SECONDS)
    if code != 0:
        left.append("the server did not end" if code is None else f"the server ended with exit code {code}")
    left += [f"worker {pid} outlived the server" for pid in open_children(children)]
    return left
