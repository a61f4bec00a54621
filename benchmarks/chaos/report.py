"""A soak's report, in plain types."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median, quantiles
from typing import Any

import psutil

from chaos.judge import SoakRun
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


def summary(report: dict[str, Any]) -> str:
    """For people: all but what fills pages."""
    shown = {key: value for key, value in report.items() if key not in ("details", "settings")}
    return json.dumps(shown, indent=1)


def _health(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = (quantiles(seconds, n=100, method="inclusive")[place] for place in (49, 98))
    return {"median": round(p50, 4), "p99": round(p99, 3), "most": round(max(seconds), 3)}


def _memory(run: SoakRun) -> dict[str, Any]:
    api = run.api_slope
    return {"api": api and asdict(api), "workers": [asdict(slope) for slope in run.worker_slopes]}
