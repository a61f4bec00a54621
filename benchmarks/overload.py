"""Many more clients at once than slots and queue take: each is answered or told when to come again.

    python benchmarks/overload.py --clients 200 --queue-limit 32 --json overload.json

The server is `medusa serve` with the embedded model. First one client asks alone; then all ask at once for a
stream; then such waves come so fast that the queue never empties. The run fails (exit code 1) if

- an answer is anything but a whole stream, or a 429 or 503 with Retry-After in OpenAI's shape,
- the 99th percentile of the time to the first token of those admitted, as the clients see it, reaches queue
  limit x service time: how long a request occupies its slot, the mean of this run by the server's figures.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Annotated, Any

import httpx
import typer
from chaos.load import judged
from chaos.outcomes import Kind, Outcome
from chaos.report import machine_facts
from chaos.server_process import ServerProcess
from chaos.world import World, ask_stream, new_client, served_by

PATIENCE = 300.0
ALONE = 10
OVERLAP = 0.4  # of the time a full queue takes: when the next wave comes


def main(
    clients: Annotated[int, typer.Option(min=2, help="In each wave.")] = 200,
    queue_limit: Annotated[int, typer.Option(min=1)] = 32,
    slots: Annotated[int, typer.Option(min=1)] = 1,
    waves: Annotated[int, typer.Option(min=0, help="After the first, overlapping.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=2)] = 64,
    seed: int = 1,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print and write what was measured; exit code 1 if it breaks the bounds."""
    report = asyncio.run(
        overload(
            clients=clients,
            queue_limit=queue_limit,
            slots=slots,
            waves=waves,
            max_tokens=max_tokens,
            seed=seed,
        )
    )
    print(json.dumps(report, indent=2))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if report["failures"]:
        raise typer.Exit(1)


async def overload(
    *,
    clients: int,
    queue_limit: int,
    slots: int,
    waves: int,
    max_tokens: int,
    seed: int,
    flags: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Start a server, load it, and judge. `flags`: more settings of the server."""
    own = {"queue_limit": queue_limit, "slots": slots, "log_level": "warning"}
    with ServerProcess(own | dict(flags or {})) as server:
        await asyncio.to_thread(server.wait_ready)
        async with new_client(server.port) as http:
            world = await _new_world(server, http, slots, queue_limit, seed)
            alone = [await _timed(world, max_tokens) for _ in range(ALONE)]
            before = server.metrics()
            interval = OVERLAP * mean(alone) * queue_limit / slots
            outcomes = await _waves(world, clients, max_tokens, waves, interval)
        service = _service_seconds(before, server.metrics())
    return _report(outcomes, alone, service, queue_limit) | {
        "clients": clients,
        "queue_limit": queue_limit,
        "slots": slots,
        "waves": 1 + waves,
        "max_tokens": max_tokens,
        "seed": seed,
        "machine": machine_facts(),
    }


async def _new_world(
    server: ServerProcess, http: httpx.AsyncClient, slots: int, queue_limit: int, seed: int
) -> World:
    return World(
        port=server.port,
        served=await served_by(http, slots, queue_limit),
        http=http,
        chance=random.Random(seed),
        patience=PATIENCE,
        send_timeout=0.0,
        body_limit=0,
    )


async def _timed(world: World, max_tokens: int) -> float:
    start = time.monotonic()
    await ask_stream(world, world.long_body(max_tokens=max_tokens))
    return time.monotonic() - start


async def _waves(world: World, clients: int, max_tokens: int, waves: int, interval: float) -> list[Outcome]:
    """All outcomes: of one wave to its end, then of overlapping ones."""

    async def one(world: World) -> Sequence[Outcome]:
        outcome, _ = await ask_stream(world, world.long_body(max_tokens=max_tokens))
        return [outcome]

    async def wave(after: float) -> list[Outcome]:
        await asyncio.sleep(after)
        ended = await asyncio.gather(*(judged("overload", one, world) for _ in range(clients)))
        return [outcome for outcomes in ended for outcome in outcomes]

    first = await wave(0.0)
    later = await asyncio.gather(*(wave(number * interval) for number in range(waves)))
    return first + [outcome for outcomes in later for outcome in outcomes]


def _service_seconds(before: dict[str, float], after: dict[str, float]) -> float:
    """Mean time from getting a slot to the end, of the requests between two scrapes."""

    def gained(name: str) -> float:
        return after[name] - before[name]

    in_slot = gained("medusa_request_seconds_sum") - gained("medusa_queue_wait_seconds_sum")
    return in_slot / gained("medusa_request_seconds_count")


def _report(
    outcomes: Sequence[Outcome], alone: Sequence[float], service: float, queue_limit: int
) -> dict[str, Any]:
    waits = sorted(outcome.first_token for outcome in outcomes if outcome.first_token is not None)
    p99 = quantiles(waits, n=100, method="inclusive")[98]
    bound = queue_limit * service
    broken = [o.detail for o in outcomes if o.kind not in (Kind.COMPLETED, Kind.REFUSED)]
    failures = [f"{len(broken)} answers were neither whole nor a refusal: {broken[:5]}"] if broken else []
    if p99 >= bound:
        failures.append(f"p99 of the time to the first token is {p99:.2f} s, the bound {bound:.2f} s")
    if not any(outcome.kind is Kind.REFUSED for outcome in outcomes):
        failures.append("nobody was refused: this was no overload")
    return {
        "passed": not failures,
        "failures": failures,
        "answers": dict(Counter(f"{outcome.kind.value} {outcome.detail}" for outcome in outcomes)),
        "admitted": len(waits),
        "service_seconds": {
            "in_this_run": service,
            "alone_median": median(alone),
            "alone_p99": quantiles(alone, n=100, method="inclusive")[98],
        },
        "first_token_seconds": {"median": median(waits), "p99": p99, "most": waits[-1]},
        "bound_seconds": bound,
        "p99_over_bound": p99 / bound,
    }


if __name__ == "__main__":
    typer.run(main)
