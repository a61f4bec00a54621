"""What is done to workers while clients ask: SIGKILL, SIGSTOP for good, and hiccups that must do no harm."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from chaos.server_process import ServerProcess

RECOVERY_SECONDS = 90.0
POLL = 0.1
HICCUP, KILL, STOP = "hiccup", "kill", "stop"
LOADING_KILL, LOADING_STOP = "kill while loading", "stop while loading"  # each after a kill
LOADING_SECONDS = 2.0  # at most so long after a loading worker was seen first
ROUNDS_A_LOADING_KILL = 3
ROUNDS_A_LOADING_STOP = 5
ROUNDS_A_STOP = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """One to come, `due` seconds after the start."""

    due: float
    kind: str


@dataclass(slots=True)
class FaultLog:
    """What was done and when, how long the server took to be ready again, and what went wrong."""

    done: Counter[str] = field(default_factory=Counter)
    times: list[tuple[float, str]] = field(default_factory=list)
    recovery_seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def num_deaths(self) -> int:
        """Each of them ended one worker process."""
        return self.done.total() - self.done[HICCUP]


def plan_faults(chance: random.Random, seconds: float, interval: float) -> list[Fault]:
    """A round each `interval`: a hiccup, a kill, and in some of them more."""
    faults: list[Fault] = []
    for number in range(max(1, round(seconds / interval))):
        start = number * interval
        faults.append(Fault(start + chance.uniform(0.0, 0.2) * interval, HICCUP))
        faults.append(Fault(start + chance.uniform(0.2, 0.6) * interval, _killing(number)))
        if number % ROUNDS_A_STOP == 1:
            faults.append(Fault(start + chance.uniform(0.8, 1.0) * interval, STOP))
    return faults


def _killing(number: int) -> str:
    if number % ROUNDS_A_LOADING_STOP == ROUNDS_A_LOADING_STOP - 1:
        return LOADING_STOP
    return LOADING_KILL if number % ROUNDS_A_LOADING_KILL == 1 else KILL


class FaultInjector:
    """Carries a plan out on the only worker of a server."""

    def __init__(self, server: ServerProcess, chance: random.Random, stall_timeout: float) -> None:
        self.log = FaultLog()
        self._server = server
        self._chance = chance
        self._stall_timeout = stall_timeout

    async def run(self, plan: Sequence[Fault]) -> None:
        """Returns after the last fault with a worker ready, or when the server has not recovered from one."""
        start = time.monotonic()
        for fault in plan:
            await asyncio.sleep(max(0.0, start + fault.due - time.monotonic()))
            worker = await self._next_worker(not_this=None)
            if worker is None:
                return
            self.log.times.append((round(time.monotonic() - self._server.started, 1), fault.kind))
            await self._inject(fault.kind, worker)

    async def _inject(self, kind: str, worker: int) -> None:
        match kind:
            case "hiccup":
                await self._hiccup(worker)
            case "kill":
                self._send(worker, signal.SIGKILL, KILL)
                await self._wait_recovered(worker, KILL)
            case "kill while loading":
                await self._hit_while_loading(worker, signal.SIGKILL, LOADING_KILL)
            case "stop while loading":
                await self._hit_while_loading(worker, signal.SIGSTOP, LOADING_STOP)
            case "stop":
                self._send(worker, signal.SIGSTOP, STOP)
                await self._wait_recovered(worker, STOP)

    async def _hit_while_loading(self, worker: int, number: signal.Signals, kind: str) -> None:
        self._send(worker, signal.SIGKILL, KILL)
        loading = await self._next_worker(not_this=worker)
        if loading is not None:
            await asyncio.sleep(self._chance.uniform(0.0, LOADING_SECONDS))
            self._send(loading, number, kind)
            await self._wait_recovered(loading, kind)

    async def _hiccup(self, worker: int) -> None:
        """Shorter than what counts as hung: the same worker must go on."""
        self._send(worker, signal.SIGSTOP, HICCUP)
        await asyncio.sleep(self._chance.uniform(0.1, 0.5) * self._stall_timeout)
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)
        await asyncio.sleep(0.5)
        if worker not in self._server.workers():
            self.log.failures.append("a worker was replaced though it paused for less than the stall timeout")

    def _send(self, worker: int, number: signal.Signals, kind: str) -> None:
        try:
            os.kill(worker, number)
        except ProcessLookupError:
            self.log.failures.append(f"worker {worker} had gone by itself before its {kind}")
        else:
            self.log.done[kind] += 1

    async def _next_worker(self, not_this: int | None) -> int | None:
        """The worker there is, or comes; None, noted as a failure, if none does."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        while time.monotonic() < deadline:
            for worker in self._server.workers():
                if worker != not_this:
                    return worker
            await asyncio.sleep(POLL)
        self.log.failures.append(f"no worker within {RECOVERY_SECONDS:g} s")
        return None

    async def _wait_recovered(self, old: int, kind: str) -> None:
        """Until another worker takes requests; kills one that the server should have killed, to go on."""
        start = time.monotonic()
        while time.monotonic() < start + RECOVERY_SECONDS:
            workers = self._server.workers()
            if workers and old not in workers and await asyncio.to_thread(self._server.is_ready):
                self.log.recovery_seconds.setdefault(kind, []).append(time.monotonic() - start)
                return
            await asyncio.sleep(POLL)
        self.log.failures.append(f"not ready {RECOVERY_SECONDS:g} s after a {kind}")
        with suppress(ProcessLookupError):
            os.kill(old, signal.SIGKILL)
