"""The soak and the overload benchmark in miniature: real servers, all classes of clients, one kill."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from chaos.clients import CLIENTS, WEIGHTS
from chaos.report import summary
from chaos.soak import SoakSettings, soak
from overload import overload

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_soak():
    settings = SoakSettings(
        seconds=10.0,
        seed=1,
        concurrency=6,
        slots=2,
        queue_limit=6,
        kill_interval=10.0,
        calm=0.0,
        load_timeout=60.0,
        send_timeout=2.0,
        warm_up=3.0,
        health_limit=60.0,
        weights=dict.fromkeys(CLIENTS, 1),
        more_flags={"measure": "false"},
    )
    report = asyncio.run(soak(settings))
    assert report["failures"] == [], report["failed_requests"]
    assert report["passed"] is True
    assert set(report["classes"]) == set(CLIENTS) == set(WEIGHTS)
    assert report["faults"] == {"hiccup": 1, "kill": 1}
    assert report["worker_restarts"] == 1
    assert report["requests"] == sum(sum(ends.values()) for ends in report["classes"].values())
    assert report["classes"]["seeded"]["completed"] > 1
    assert report["classes"]["burst"]["refused"] > 0
    assert len(json.dumps(report)) < 100_000
    assert json.loads(summary(report))["passed"] is True


def test_overload():
    report = asyncio.run(
        overload(
            clients=24, queue_limit=4, slots=2, waves=1, max_tokens=16, seed=1, flags={"measure": "false"}
        )
    )
    # Times are the machine's; what is answered is not.
    assert [failure for failure in report["failures"] if "p99" not in failure] == []
    assert sum(report["answers"].values()) == 48
    assert report["admitted"] >= 6
    assert report["service_seconds"]["in_this_run"] > 0


@pytest.mark.parametrize("name", ["soak.py", "overload.py"])
def test_options_are_read(name):
    shown = subprocess.run([sys.executable, BENCHMARKS / name, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--queue-limit" in shown.stdout
