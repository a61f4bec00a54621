"""Clients at work: so many at once, each dealt a class, until the time is up; every end is written down."""

import asyncio
import sys
import time
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from chaos.clients import CLIENTS, WEIGHTS, Client
from chaos.outcomes import ContractError, Kind, Outcome
from chaos.server_process import Sample, ServerProcess
from chaos.world import World

SAMPLE_SECONDS = 1.0
PROBER = Path(__file__).with_name("prober.py")
KEPT_FAILURES = 50


@dataclass(slots=True)
class Tally:
    """Ends by class, and what failed in words (the first of them)."""

    ends: dict[str, Counter[Kind]] = field(default_factory=dict)
    details: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)

    def add(self, name: str, outcome: Outcome) -> None:
        self.ends.setdefault(name, Counter())[outcome.kind] += 1
        if outcome.kind is not Kind.FAILED:
            self.details.setdefault(name, Counter())[outcome.detail] += 1
        elif len(self.failures) < KEPT_FAILURES:
            self.failures.append(f"{name}: {outcome.detail}")
        if outcome.first_token is not None:
            self.first_tokens.append(outcome.first_token)

    def count(self, *kinds: Kind) -> int:
        """Of these kinds, in all classes; of all kinds if none is named."""
        return sum(ends[kind] for ends in self.ends.values() for kind in kinds or Kind)

    def count_detail(self, code: str) -> int:
        """Ends whose detail names this code."""
        return sum(n for counts in self.details.values() for text, n in counts.items() if code in text)


async def judged(name: str, client: Client, world: World) -> Sequence[Outcome]:
    """Let one client run; whatever is no legal end is a failed request."""
    try:
        async with asyncio.timeout(world.patience):
            return await client(world)
    except TimeoutError:
        detail = f"no end within {world.patience:g} s"
    except ContractError as error:
        detail = str(error)
    except (httpx.TransportError, OSError) as error:
        detail = f"the connection failed: {type(error).__name__} {error}"
    return [Outcome(kind=Kind.FAILED, detail=detail)]


async def run_load(
    world: World, tally: Tally, *, concurrency: int, seconds: float, weights: Mapping[str, int] = WEIGHTS
) -> None:
    """`concurrency` clients, each after the other, that start none after `seconds`."""
    end = time.monotonic() + seconds
    deck: list[str] = []

    def deal() -> str:
        if not deck:
            deck.extend(name for name, count in weights.items() for _ in range(count))
            world.chance.shuffle(deck)
        return deck.pop()

    async def work() -> None:
        while time.monotonic() < end:
            name = deal()
            for outcome in await judged(name, CLIENTS[name], world):
                tally.add(name, outcome)
            await asyncio.sleep(world.chance.uniform(0.0, 0.1))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())


async def probe(port: int, seconds: list[float]) -> None:
    """How long the server takes to say that it lives, until cancelled. Raises if it says no."""
    prober = await asyncio.create_subprocess_exec(
        sys.executable, str(PROBER), str(port), stdout=PIPE, stderr=PIPE
    )
    assert prober.stdout is not None
    assert prober.stderr is not None
    try:
        async for line in prober.stdout:
            seconds.append(float(line))
        raise ContractError((await prober.stderr.read()).decode()[-300:])
    finally:
        with suppress(ProcessLookupError):
            prober.kill()
        await prober.wait()


async def watch(server: ServerProcess, samples: list[Sample]) -> None:
    """Sample the processes until cancelled."""
    while True:
        samples.append(server.sample())
        await asyncio.sleep(SAMPLE_SECONDS)
