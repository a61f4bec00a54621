"""The course of a soak: warm up, load with faults, calm, and then count what is left."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from chaos.clients import WEIGHTS
from chaos.faults import FaultInjector, plan_faults
from chaos.judge import SoakRun, find_failures
from chaos.leaks import end_politely, fill_slots, settle
from chaos.load import Tally, probe, run_load, watch
from chaos.report import build_report
from chaos.server_process import ServerProcess
from chaos.world import World, new_client, served_by

PATIENCE_MARGIN = 20.0  # seconds beyond the request timeout, which the server itself holds
DRAIN_TIMEOUT = 30.0
# Repeated in every chunk, so that answers of a small model fill the buffers of one who does not read.
SERVED_NAME = "medusa-soak-" + "m" * 400


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakSettings:
    """Seconds throughout. `calm`: share of `seconds`, at their end, without faults."""

    seconds: float
    seed: int
    concurrency: int
    slots: int
    queue_limit: int
    kill_interval: float = 52.0  # on average
    calm: float = 0.12
    stall_timeout: float = 4.0
    load_timeout: float = 30.0
    request_timeout: float = 60.0
    send_timeout: float = 4.0
    warm_up: float = 15.0
    body_limit: int = 2**20
    body_timeout: float = 5.0
    health_limit: float = 3.0
    weights: Mapping[str, int] = field(default_factory=lambda: dict(WEIGHTS))
    more_flags: Mapping[str, object] = field(default_factory=dict)

    def flags(self) -> dict[str, object]:
        """Of `medusa serve`."""
        return {
            "served_name": SERVED_NAME,
            "dtype": "float32",  # in which texts are bound to be the same
            "slots": self.slots,
            "queue_limit": self.queue_limit,
            "stall_timeout": self.stall_timeout,
            "load_timeout": self.load_timeout,
            "request_timeout": self.request_timeout,
            "send_timeout": self.send_timeout,
            "drain_timeout": DRAIN_TIMEOUT,
            "max_body_bytes": self.body_limit,
            "body_timeout": self.body_timeout,
            "log_level": "warning",
        } | dict(self.more_flags)


async def soak(settings: SoakSettings) -> dict[str, Any]:
    """Run it; the report's `failures` is empty if all went well."""
    chance = random.Random(settings.seed)
    with ServerProcess(settings.flags()) as server:
        await asyncio.to_thread(server.wait_ready)
        world = await _new_world(server, settings, chance)
        run = await _run(server, world, settings, chance)
        run.log = server.log()
    failures = find_failures(run, settings.slots, settings.health_limit)
    return build_report(run, failures, asdict(settings))


async def _run(server: ServerProcess, world: World, settings: SoakSettings, chance: random.Random) -> SoakRun:
    run = SoakRun()
    watching = asyncio.create_task(watch(server, run.samples))
    probing = asyncio.create_task(probe(server.port, run.health_seconds))
    try:
        await _load(world, run.tally, settings, settings.warm_up)
        run.level_before, run.left = await settle(server)
        injector = FaultInjector(server, random.Random(settings.seed + 1), settings.stall_timeout)
        run.faults = injector.log
        faulty_seconds = settings.seconds * (1.0 - settings.calm)
        plan = plan_faults(chance, faulty_seconds, settings.kill_interval)
        async with asyncio.TaskGroup() as group:
            group.create_task(injector.run(plan))
            group.create_task(_load(world, run.tally, settings, settings.seconds))
        run.level_after, left = await settle(server, run.level_before)
        run.left += left
        run.metrics = await asyncio.to_thread(server.metrics)
        if probing.done():
            run.left.append(f"GET /health failed: {probing.exception()!r}")
        await _end(probing)
        await _check_end(server, world, run)
    finally:
        await _end(probing)
        await _end(watching)
    return run


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])


async def _check_end(server: ServerProcess, world: World, run: SoakRun) -> None:
    async with new_client(world.port) as world.http:
        problem = await fill_slots(world, server)
        run.left += [problem] if problem else []
        run.left += await end_politely(world, server, DRAIN_TIMEOUT)


async def _load(world: World, tally: Tally, settings: SoakSettings, seconds: float) -> None:
    """With a client of its own, whose kept connections are gone afterwards."""
    async with new_client(world.port) as world.http:
        await run_load(
            world, tally, concurrency=settings.concurrency, seconds=seconds, weights=settings.weights
        )


async def _new_world(server: ServerProcess, settings: SoakSettings, chance: random.Random) -> World:
    async with new_client(server.port) as http:
        served = await served_by(http, settings.slots, settings.queue_limit)
    return World(
        port=server.port,
        served=served,
        http=http,
        chance=chance,
        patience=settings.request_timeout + PATIENCE_MARGIN,
        send_timeout=settings.send_timeout,
        body_limit=settings.body_limit,
    )
