"""Streams through Ray Serve while a replica is killed, and while the application is updated.

    python benchmarks/ray_streams.py --json benchmarks/results/ray_streams.json

Two CPU replicas of the demo model on this machine, deployed with the shipped config. Requests are streamed, a
bounded number at a time. In the middle the process of a replica that is streaming gets a SIGKILL. Then the
replacement has to serve, and the same streams run once more while `serve run` rolls out a changed setting.

Every finished text is compared with what plain `medusa serve` answers. Which replica served a request is read
from Ray's access logs, so that a stream that broke on a surviving replica would be seen. Ends with status 1
if a request hangs, if any but the killed replica's own fails, or if the update breaks one.
"""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from http_speed import running_server
from ray_cluster import Cluster, Replica, local_cluster
from ray_load import NUM_VARIANTS, Load, Outcome

from medusa_core.config import EMBEDDED_MODEL
from medusa_core.machine import machine_facts

RECOVERY_BATCHES = 40
LOG_SECONDS = 1.0  # until the last accesses are in Ray's logs


async def kill_one(load: Load, cluster: Cluster) -> dict[str, Any]:
    """SIGKILL a replica with a stream in progress once a third of the requests are done."""
    await load.wait_until_done(load.total // 3)
    replicas = await asyncio.to_thread(cluster.ready_replicas)
    victim: Replica | None = None
    own = 0
    while victim is None:
        for replica in replicas:
            running, waiting = replica.metric("medusa_running"), replica.metric("medusa_queue_depth")
            if running:
                victim, own = replica, int(running + waiting)
                break
    done, opened = len(load.outcomes), load.num_open
    os.kill(victim.pid, signal.SIGKILL)
    killed = time.monotonic()
    workers_gone = await wait_gone(victim.workers)
    return {
        "victim": asdict(victim),
        "time": killed,
        "finished_before": done,
        "open_at_kill": opened,
        "on_victim_at_kill": own,
        "worker_left_after_seconds": workers_gone,
    }


async def wait_gone(pids: tuple[int, ...]) -> float | None:
    """Seconds until none of the processes is left; None if one stays for 20 s."""
    started = time.monotonic()
    while time.monotonic() - started < 20.0:
        if not any(is_running(pid) for pid in pids):
            return round(time.monotonic() - started, 3)
        await asyncio.sleep(0.02)
    return None


def is_running(pid: int) -> bool:
    """Whether it holds memory still; one that waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def load_and_kill(load: Load, cluster: Cluster) -> dict[str, Any]:
    _, kill = await asyncio.gather(load.run(), kill_one(load, cluster))
    return kill


def recover(cluster: Cluster, kill: dict[str, Any], max_tokens: int) -> tuple[list[Outcome], dict[str, Any]]:
    """Requests after the replacement is ready, until it has served some of them."""
    replicas = cluster.wait_for("replacement", lambda found: len(found) == 2)
    recovery = round(time.monotonic() - kill["time"], 1)
    names = {replica.name for replica in replicas}
    outcomes: list[Outcome] = []
    served: set[str] = set()
    for batch in range(RECOVERY_BATCHES):
        outcomes += asyncio.run(Load(cluster.url, f"after-{batch}", 8, 4, max_tokens).run())
        served = {name for request, name in cluster.served_by().items() if request.startswith("after-")}
        if names <= served:
            break
    return outcomes, {"two_replicas_ready_after_seconds": recovery, "replacement_served": names <= served}


async def load_and_update(load: Load, cluster: Cluster) -> dict[str, Any]:
    """A changed setting is rolled out once some requests have been answered."""
    before = {replica.pid for replica in await asyncio.to_thread(cluster.ready_replicas)}

    async def update() -> None:
        await load.wait_until_done(load.total // 10)
        await asyncio.to_thread(cluster.deploy, MEDUSA_QUEUE_LIMIT="63")
        await asyncio.to_thread(
            cluster.wait_for,
            "updated replicas",
            lambda replicas: len(replicas) == 2 and not before & {replica.pid for replica in replicas},
        )
        load.goes_on = False

    load.goes_on = True
    await asyncio.gather(load.run(), update())
    return {"replicas_replaced": len(before)}


def judge_kill(
    outcomes: list[Outcome], kill: dict[str, Any], served_by: dict[str, str], texts: dict[int, str]
) -> list[str]:
    """What went wrong, if anything."""
    failed = [outcome for outcome in outcomes if outcome.end != "finished"]
    victim = kill["victim"]["name"]
    problems = [f"{o.request_id} hangs: {o.detail}" for o in failed if o.end == "hang"]
    problems += [
        f"{o.request_id} broke on a surviving replica: {o.end} {o.detail}"
        for o in failed
        if served_by.get(o.request_id, victim) != victim
    ]
    problems += [
        f"{o.request_id} failed but was sent after the kill: {o.end} {o.detail}"
        for o in failed
        if o.started > kill["time"]
    ]
    if not failed:
        problems.append("no stream was on the killed replica, so this says nothing")
    if kill["worker_left_after_seconds"] is None:
        problems.append("the killed replica's worker is still there")
    return problems + wrong_texts(outcomes, texts)


def judge_all(outcomes: list[Outcome], texts: dict[int, str]) -> list[str]:
    """For a time in which nothing may fail."""
    failed = [outcome for outcome in outcomes if outcome.end != "finished"]
    return [f"{o.request_id}: {o.end}, {o.detail}" for o in failed] + wrong_texts(outcomes, texts)


def wrong_texts(outcomes: list[Outcome], texts: dict[int, str]) -> list[str]:
    return [
        f"{o.request_id} finished with another text than plain serving"
        for o in outcomes
        if o.end == "finished" and o.text != texts[o.variant]
    ]


def plain_texts(max_tokens: int) -> dict[int, str]:
    """What `medusa serve` without Ray streams for every variant."""

    async def ask(url: str) -> list[Outcome]:
        return await Load(url, "plain", NUM_VARIANTS, 1, max_tokens).run()

    with running_server(str(EMBEDDED_MODEL), None, "float32") as url:
        outcomes = asyncio.run(ask(url))
    if any(outcome.end != "finished" for outcome in outcomes):
        raise SystemExit(f"the plain server failed: {outcomes}")
    return {outcome.variant: outcome.text for outcome in outcomes}


def summary(outcomes: list[Outcome], served_by: dict[str, str]) -> dict[str, Any]:
    return {
        "requests": len(outcomes),
        "ends": dict(Counter(o.end for o in outcomes)),
        "failures": [f"{o.request_id}: {o.end}, {o.detail}" for o in outcomes if o.end != "finished"],
        "logged_by_replica": dict(Counter(served_by.get(o.request_id, "none") for o in outcomes)),
    }


def main(
    requests: Annotated[int, typer.Option(min=16)] = 200,
    concurrency: Annotated[int, typer.Option(min=2)] = 16,
    max_tokens: Annotated[int, typer.Option(min=2)] = 128,
    update: Annotated[bool, typer.Option(help="Also roll out a change under load.")] = True,
    measure: Annotated[
        bool, typer.Option(help="Let replicas time their steps, as they do by default.")
    ] = True,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print and write what became of every request."""
    texts = plain_texts(max_tokens)
    with local_cluster(MEDUSA_MEASURE=str(measure).lower()) as cluster:
        load = Load(cluster.url, "kill", requests, concurrency, max_tokens)
        kill = asyncio.run(load_and_kill(load, cluster))
        after, recovered = recover(cluster, kill, max_tokens)
        time.sleep(LOG_SECONDS)
        served_by = cluster.served_by()
        killed = {name: value for name, value in kill.items() if name != "time"}
        report = {
            "kill": summary(load.outcomes, served_by) | killed,
            "after": summary(after, served_by) | recovered,
        }
        problems = judge_kill(load.outcomes, kill, served_by, texts) + judge_all(after, texts)
        if not recovered["replacement_served"]:
            problems.append("the replacement served nothing")
        if update:
            rolled = Load(cluster.url, "update", requests, concurrency, max_tokens)
            replaced = asyncio.run(load_and_update(rolled, cluster))
            time.sleep(LOG_SECONDS)
            report["update"] = summary(rolled.outcomes, cluster.served_by()) | replaced
            problems += judge_all(rolled.outcomes, texts)
    report |= {"problems": problems, "concurrency": concurrency, "max_tokens": max_tokens}
    report |= {"config": machine_facts()}
    print(json.dumps(report, indent=2))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
