"""A soak's report: JSON to keep, a table to read."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median, quantiles
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chaos.judge import SoakRun
from chaos.memory import MIB, thin_out
from chaos.outcomes import Kind

LOG_END = 6000  # characters of the server's log, kept where something failed


def build_report(run: SoakRun, failures: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything, in plain types."""
    tally = run.tally
    return {
        "passed": not failures,
        "failures": list(failures),
        "failed_requests": tally.failures,
        "requests": tally.count(),
        "without_terminal_event": tally.count(Kind.FAILED),
        "classes": {
            name: {kind: ends[kind] for kind in Kind if ends[kind]}
            for name, ends in sorted(tally.ends.items())
        },
        "details": {name: dict(counts.most_common()) for name, counts in sorted(tally.details.items())},
        "faults": dict(run.faults.done),
        "fault_times": run.faults.times,
        "recovery_seconds": {
            kind: {"median": round(median(seconds), 1), "most": round(max(seconds), 1)}
            for kind, seconds in run.faults.recovery_seconds.items()
        },
        "health_seconds": _health(run.health_seconds),
        "worker_restarts": run.metrics.get("medusa_worker_restarts_total"),
        "level_before": run.level_before and asdict(run.level_before),
        "level_after": run.level_after and asdict(run.level_after),
        "memory": _memory(run),
        "log_end": run.log[-LOG_END:] if failures else "",
        "settings": settings,
        "machine": machine_facts(),
    }


def machine_facts() -> dict[str, Any]:
    """Where it was measured."""
    return {
        "cpus": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    """For people."""
    table = Table(title=f"{report['requests']} requests")
    table.add_column("class")
    for kind in Kind:
        table.add_column(kind.value, justify="right")
    for name, ends in report["classes"].items():
        table.add_row(name, *(str(ends.get(kind, "")) for kind in Kind))
    console.print(table)
    faults = ", ".join(f"{count} {kind}" for kind, count in report["faults"].items())
    console.print(f"faults: {faults or 'none'}; worker restarts: {report['worker_restarts']:g}")
    for kind, seconds in report["recovery_seconds"].items():
        console.print(
            f"ready again after a {kind}: {seconds['median']} s (median), {seconds['most']} s (most)"
        )
    health = report["health_seconds"]
    console.print(
        f"GET /health: {health['median']} s (median), {health['p99']} s (p99), {health['most']} s (most)"
    )
    memory = report["memory"]
    for name, slope in [("API process", memory["api"]), *(("worker", slope) for slope in memory["workers"])]:
        if slope is not None:
            console.print(
                f"memory of the {name}: {slope['value']:+.2f} MiB a minute "
                f"({slope['low']:+.2f} to {slope['high']:+.2f}) over {slope['minutes']:.1f} minutes"
            )
    console.print(f"idle before the load: {report['level_before']}, after: {report['level_after']}")
    for failure in [*report["failures"], *report["failed_requests"]]:
        console.print(f"[red]{escape(failure[:2000])}[/red]")
    console.print("[green]passed[/green]" if report["passed"] else "[red]failed[/red]")


def _health(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = (quantiles(seconds, n=100, method="inclusive")[place] for place in (49, 98))
    return {"median": round(p50, 4), "p99": round(p99, 3), "most": round(max(seconds), 3)}


def _memory(run: SoakRun) -> dict[str, Any]:
    samples = thin_out(run.samples)
    api = run.api_slope
    return {
        "api": api and asdict(api),
        "workers": [asdict(slope) for slope in run.worker_slopes],
        "columns": ["seconds", "api MiB", "worker MiB", "descriptors", "threads"],
        "samples": [
            [
                round(sample.at),
                round(sample.rss / MIB, 1),
                round(sum(sample.workers.values()) / MIB, 1),
                sample.fds,
                sample.threads,
            ]
            for sample in samples
        ],
    }
